package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// A token that cannot be fetched for so long is a failure; a new agent takes over sooner.
const patience = 5 * time.Second

// workload is a workload as go-spiffe's users write it. Each request is a connection of its own; the first that fails
// ends the program. A line of standard input is answered with what there was so far.
func workload(args []string) error {
	flags := newFlags("workload")
	audience := flags.String("audience", "", "whom tokens are fetched for")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	socket, err := filepath.Abs(positional[0])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	begin, done := context.WithTimeout(ctx, 30*time.Second)
	defer done()
	options := workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + socket))
	x509Source, err := workloadapi.NewX509Source(begin, options)
	if err != nil {
		return fmt.Errorf("X509Source: %w", err)
	}
	defer x509Source.Close()
	jwtSource, err := workloadapi.NewJWTSource(begin, options)
	if err != nil {
		return fmt.Errorf("JWTSource: %w", err)
	}
	defer jwtSource.Close()
	svid, err := x509Source.GetX509SVID()
	if err != nil {
		return err
	}

	listener, err := tls.Listen("tcp", "127.0.0.1:0",
		tlsconfig.MTLSServerConfig(x509Source, x509Source, tlsconfig.AuthorizeID(svid.ID)))
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "hello")
	})}
	go server.Serve(listener)
	defer server.Close()
	client := &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			TLSClientConfig:   tlsconfig.MTLSClientConfig(x509Source, x509Source, tlsconfig.AuthorizeID(svid.ID)),
		},
	}

	lines := make(chan string)
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(os.Stdin)
		for scanner.Scan() {
			lines <- scanner.Text()
		}
	}()
	serials := map[string]bool{}
	requests, tokens, missed := 0, 0, 0
	fetched := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case _, more := <-lines:
			if !more {
				return nil
			}
			fmt.Printf("id=%s requests=%d serials=%d tokens=%d missed=%d\n",
				svid.ID, requests, len(serials), tokens, missed)
		case <-tick.C:
			response, err := client.Get("https://" + listener.Addr().String())
			if err != nil {
				return fmt.Errorf("request %d: %w", requests, err)
			}
			_, err = io.ReadAll(response.Body)
			response.Body.Close()
			if err != nil {
				return fmt.Errorf("request %d: %w", requests, err)
			}
			requests++
			serials[response.TLS.PeerCertificates[0].SerialNumber.String()] = true
			if err := fetchToken(ctx, jwtSource, *audience); err == nil {
				tokens++
				fetched = time.Now()
			} else if time.Since(fetched) > patience {
				return fmt.Errorf("token %d: %w", tokens, err)
			} else {
				missed++
			}
		}
	}
}

// fetchToken has a token judged by go-spiffe, with the bundle of its source.
func fetchToken(ctx context.Context, source *workloadapi.JWTSource, audience string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return err
	}
	judged, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{audience})
	if err != nil {
		return err
	}
	if judged.ID != svid.ID {
		return fmt.Errorf("is %s, not %s", judged.ID, svid.ID)
	}
	return nil
}
