package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// checkJWT validates the tokens of standard input, one a line, and ends with the first that is refused.
func checkJWT(args []string) error {
	flags := newFlags("jwt")
	domain := flags.String("trust-domain", "", "the trust domain that the bundle is for")
	audience := flags.String("audience", "", "who the token has to be for")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	trustDomain, err := spiffeid.TrustDomainFromString(*domain)
	if err != nil {
		return fmt.Errorf("%w: --trust-domain: %v", errUsage, err)
	}
	bundle, err := spiffebundle.Load(trustDomain, positional[0])
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		svid, err := jwtsvid.ParseAndValidate(lines.Text(), bundle, []string{*audience})
		if err != nil {
			return err
		}
		fmt.Printf("id=%s audience=%s expiry=%d\n", svid.ID, strings.Join(svid.Audience, ","), svid.Expiry.Unix())
	}
	return lines.Err()
}

// federate fetches a bundle as a SPIFFE bundle endpoint's client does, and prints it.
func federate(args []string) error {
	flags := newFlags("federate")
	domain := flags.String("trust-domain", "", "whose bundle it is")
	endpoint := flags.String("endpoint-id", "", "https_spiffe: the SPIFFE ID of the endpoint")
	bootstrap := flags.String("bundle", "", "https_spiffe: the bundle of the endpoint's trust domain")
	roots := flags.String("roots", "", "https_web: the roots, PEM")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	trustDomain, err := spiffeid.TrustDomainFromString(*domain)
	if err != nil {
		return fmt.Errorf("%w: --trust-domain: %v", errUsage, err)
	}
	var option federation.FetchOption
	if *endpoint != "" {
		id, err := spiffeid.FromString(*endpoint)
		if err != nil {
			return fmt.Errorf("%w: --endpoint-id: %v", errUsage, err)
		}
		bundle, err := spiffebundle.Load(id.TrustDomain(), *bootstrap)
		if err != nil {
			return err
		}
		option = federation.WithSPIFFEAuth(bundle, id)
	} else {
		text, err := os.ReadFile(*roots)
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(text)
		option = federation.WithWebPKIRoots(pool)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	bundle, err := federation.FetchBundle(ctx, trustDomain, positional[0], option)
	if err != nil {
		return err
	}
	text, err := bundle.Marshal()
	if err != nil {
		return err
	}
	fmt.Println(string(text))
	return nil
}

// serveBundle serves a bundle file, read anew for each request, with go-spiffe's own handler.
func serveBundle(args []string) error {
	flags := newFlags("serve-bundle")
	domain := flags.String("trust-domain", "", "whose bundle it is")
	svidFolder := flags.String("svid", "", "https_spiffe: a delivered folder")
	certificate := flags.String("certificate", "", "https_web: the certificate, PEM")
	key := flags.String("key", "", "https_web: its key, PEM")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	trustDomain, err := spiffeid.TrustDomainFromString(*domain)
	if err != nil {
		return fmt.Errorf("%w: --trust-domain: %v", errUsage, err)
	}
	handler, err := federation.NewHandler(trustDomain, bundleFile(positional[0]))
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	if *svidFolder != "" {
		delivered, err := load(*svidFolder)
		if err != nil {
			return err
		}
		server.TLSConfig = tlsconfig.TLSServerConfig(svidSource{delivered.svid})
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		return err
	}
	fmt.Printf("https://localhost:%s\n", port)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	if err := server.ServeTLS(listener, *certificate, *key); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

type svidSource struct{ svid *x509svid.SVID }

func (s svidSource) GetX509SVID() (*x509svid.SVID, error) { return s.svid, nil }

type bundleFile string

func (f bundleFile) GetBundleForTrustDomain(trustDomain spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	return spiffebundle.Load(trustDomain, string(f))
}
