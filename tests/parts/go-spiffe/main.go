// Command go-spiffe-check reads what Mica wrote with go-spiffe and with Go's own crypto/x509.
//
// Exit codes: 0 accepted, 1 refused, 2 wrong usage. Each result is one line on standard output.
package main

import (
	"bufio"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const usage = `usage:
  svid FOLDER [--id ID] [--at RFC3339]               a delivered folder: go-spiffe's and Go's own judgement
  bundle FILE --trust-domain TD [--pem]              a trust bundle: SPIFFE JSON, or PEM
  id [TEXT...]                                       SPIFFE IDs, from standard input (one a line) where none is given
  serve FOLDER --allow ID [--listen ADDRESS]         HTTPS that asks for ID; prints its URL; ends with standard input
  get FOLDER URL --server-id ID                      one request over mutual TLS
  health ADDRESS --roots FILE --name DNS             a gRPC server's health, over TLS
    [--tls12] [--service NAME] [--watch]
  jwt BUNDLE --trust-domain TD --audience NAME       the JWT-SVIDs of standard input, by a bundle in SPIFFE JSON
  federate URL --trust-domain TD                     fetches a bundle from its endpoint and prints it
    --endpoint-id ID --bundle FILE | --roots FILE
  serve-bundle FILE --trust-domain TD                a bundle endpoint; prints its URL; ends with standard input
    --svid FOLDER | --certificate FILE --key FILE
  workload SOCKET --audience NAME                    the Workload API: X509Source, JWTSource and requests between
                                                     two ends that take all from them, until standard input ends
`

var errUsage = errors.New("wrong usage")

func main() {
	err := run(os.Args[1:])
	switch {
	case err == nil:
	case errors.Is(err, errUsage), errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(os.Stderr, "go-spiffe-check: %v\n%s", err, usage)
		os.Exit(2)
	default:
		fmt.Fprintf(os.Stderr, "go-spiffe-check: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	command, args := args[0], args[1:]
	switch command {
	case "svid":
		return checkSVID(args)
	case "bundle":
		return checkBundle(args)
	case "id":
		return checkIDs(args)
	case "serve":
		return serve(args)
	case "get":
		return get(args)
	case "health":
		return health(args)
	case "jwt":
		return checkJWT(args)
	case "federate":
		return federate(args)
	case "serve-bundle":
		return serveBundle(args)
	case "workload":
		return workload(args)
	}
	return fmt.Errorf("%w: no command %q", errUsage, command)
}

func checkSVID(args []string) error {
	flags := newFlags("svid")
	expected := flags.String("id", "", "the SPIFFE ID to insist on")
	at := flags.String("at", "", "the time to judge at; now where none is given")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	now := time.Now()
	if *at != "" {
		if now, err = time.Parse(time.RFC3339, *at); err != nil {
			return fmt.Errorf("%w: --at: %v", errUsage, err)
		}
	}

	delivered, err := load(positional[0])
	if err != nil {
		return err
	}
	raw := make([][]byte, 0, len(delivered.svid.Certificates))
	for _, certificate := range delivered.svid.Certificates {
		raw = append(raw, certificate.Raw)
	}
	id, chains, err := x509svid.ParseAndVerify(raw, delivered.bundle, x509svid.WithTime(now))
	if err != nil {
		return err
	}
	if id != delivered.svid.ID {
		return fmt.Errorf("verified as %s, loaded as %s", id, delivered.svid.ID)
	}
	if *expected != "" && id.String() != *expected {
		return fmt.Errorf("is %s, not %s", id, *expected)
	}
	for _, purpose := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := verifyPlain(delivered, purpose, now); err != nil {
			return err
		}
	}
	leaf := delivered.svid.Certificates[0]
	fmt.Printf("id=%s serial=%x not_before=%s not_after=%s certificates=%d chain=%d\n",
		id, leaf.SerialNumber, leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339),
		len(raw), len(chains[0]))
	return nil
}

// verifyPlain asks crypto/x509 alone, which also minds the extended key usage of every certificate in the path;
// go-spiffe accepts any.
func verifyPlain(delivered *folder, purpose x509.ExtKeyUsage, now time.Time) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range delivered.bundle.X509Authorities() {
		roots.AddCert(root)
	}
	for _, intermediate := range delivered.svid.Certificates[1:] {
		intermediates.AddCert(intermediate)
	}
	_, err := delivered.svid.Certificates[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{purpose},
	})
	if err != nil {
		return fmt.Errorf("crypto/x509, extended key usage %d: %w", purpose, err)
	}
	return nil
}

func checkBundle(args []string) error {
	flags := newFlags("bundle")
	domain := flags.String("trust-domain", "", "the trust domain that the bundle is for")
	asPEM := flags.Bool("pem", false, "the file is PEM, not SPIFFE JSON")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	trustDomain, err := spiffeid.TrustDomainFromString(*domain)
	if err != nil {
		return fmt.Errorf("%w: --trust-domain: %v", errUsage, err)
	}

	if *asPEM {
		bundle, err := x509bundle.Load(trustDomain, positional[0])
		if err != nil {
			return err
		}
		fmt.Printf("x509_authorities=%d\n", len(bundle.X509Authorities()))
		return nil
	}
	bundle, err := spiffebundle.Load(trustDomain, positional[0])
	if err != nil {
		return err
	}
	line := fmt.Sprintf("x509_authorities=%d jwt_authorities=%d", len(bundle.X509Authorities()), len(bundle.JWTAuthorities()))
	if sequence, ok := bundle.SequenceNumber(); ok {
		line += fmt.Sprintf(" sequence=%d", sequence)
	}
	if hint, ok := bundle.RefreshHint(); ok {
		line += fmt.Sprintf(" refresh_hint=%d", int64(hint/time.Second))
	}
	fmt.Println(line)
	return nil
}

// checkIDs answers one line for each text and ends well whatever the answers: which texts must be refused is the
// caller's knowledge.
func checkIDs(texts []string) error {
	if len(texts) > 0 {
		for _, text := range texts {
			judgeID(text)
		}
		return nil
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		judgeID(lines.Text())
	}
	return lines.Err()
}

func judgeID(text string) {
	id, err := spiffeid.FromString(text)
	if err != nil {
		fmt.Printf("err %v\n", err)
		return
	}
	fmt.Printf("ok %s\n", id)
}

func serve(args []string) error {
	flags := newFlags("serve")
	listen := flags.String("listen", "127.0.0.1:0", "where to listen")
	allow := flags.String("allow", "", "the SPIFFE ID that may call")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	allowed, err := spiffeid.FromString(*allow)
	if err != nil {
		return fmt.Errorf("%w: --allow: %v", errUsage, err)
	}
	delivered, err := load(positional[0])
	if err != nil {
		return err
	}

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	server := &http.Server{
		TLSConfig: tlsconfig.MTLSServerConfig(delivered.svid, delivered.bundle, tlsconfig.AuthorizeID(allowed)),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			fmt.Fprintln(w, caller)
		}),
		ReadHeaderTimeout: 10 * time.Second,
		// The caller is told why it was refused.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	fmt.Printf("https://%s\n", listener.Addr())
	// A test that dies closes the pipe, so no server outlives its test.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	if err := server.ServeTLS(listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func get(args []string) error {
	flags := newFlags("get")
	server := flags.String("server-id", "", "the SPIFFE ID that the server must have")
	positional, err := parse(flags, args, 2)
	if err != nil {
		return err
	}
	serverID, err := spiffeid.FromString(*server)
	if err != nil {
		return fmt.Errorf("%w: --server-id: %v", errUsage, err)
	}
	delivered, err := load(positional[0])
	if err != nil {
		return err
	}

	client := &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: tlsconfig.MTLSClientConfig(delivered.svid, delivered.bundle, tlsconfig.AuthorizeID(serverID)),
		},
	}
	response, err := client.Get(positional[1])
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err != nil {
		return err
	}
	fmt.Printf("%d %s\n", response.StatusCode, strings.TrimSpace(string(body)))
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", response.StatusCode)
	}
	return nil
}

// folder is what Mica delivers to one workload.
type folder struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
}

// load opens ..data once, as a careful reader does, so that the three files belong together.
func load(path string) (*folder, error) {
	if set, err := filepath.EvalSymlinks(filepath.Join(path, "..data")); err == nil {
		path = set
	}
	svid, err := x509svid.Load(filepath.Join(path, "cert-chain.pem"), filepath.Join(path, "key.pem"))
	if err != nil {
		return nil, err
	}
	bundle, err := x509bundle.Load(svid.ID.TrustDomain(), filepath.Join(path, "root-cert.pem"))
	if err != nil {
		return nil, err
	}
	return &folder{svid: svid, bundle: bundle}, nil
}

func newFlags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	return flags
}

// parse takes flags before, between and after the positional arguments; Go's own parser stops at the first of them.
func parse(flags *flag.FlagSet, args []string, wanted int) ([]string, error) {
	var positional []string
	for {
		if err := flags.Parse(args); err != nil {
			return nil, fmt.Errorf("%w: %v", errUsage, err)
		}
		if flags.NArg() == 0 {
			break
		}
		positional = append(positional, flags.Arg(0))
		args = flags.Args()[1:]
	}
	if len(positional) != wanted {
		return nil, fmt.Errorf("%w: %s takes %d arguments, not %d", errUsage, flags.Name(), wanted, len(positional))
	}
	return positional, nil
}
