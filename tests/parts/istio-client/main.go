// Command istio-client asks a CSR service as Istio's own agents do: with istio.io/api's messages, grpc-go and Go's
// crypto. It judges the answer by what pilot-agent and ztunnel rely on.
//
//	istio-client create [flags]    IstioCertificateService/CreateCertificate
//	istio-client handle [flags]    IstioCAService/HandleCSR, as Istio 0.2.10's node agent
//	istio-client load [flags]      CreateCertificate again and again, until standard input ends
//
// create and handle print one JSON object. Exit codes: 0 granted and as it should be, 1 refused by the server (the object
// says how), 2 wrong usage, 3 anything else, such as an answer that an agent would trip over.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

var errUsage = errors.New("wrong usage")

func main() {
	refused, err := run(os.Args[1:])
	switch {
	case errors.Is(err, errUsage), errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(os.Stderr, "istio-client: %v\n", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintf(os.Stderr, "istio-client: %v\n", err)
		os.Exit(3)
	case refused:
		os.Exit(1)
	}
}

func run(args []string) (refused bool, err error) {
	if len(args) == 0 {
		return false, fmt.Errorf("%w: create, handle or load", errUsage)
	}
	var o options
	flags := o.flags(args[0])
	if err := flags.Parse(args[1:]); err != nil {
		return false, fmt.Errorf("%w: %v", errUsage, err)
	}
	if flags.NArg() > 0 {
		return false, fmt.Errorf("%w: %q", errUsage, flags.Args())
	}
	switch args[0] {
	case "create":
		return once(&o, create)
	case "handle":
		return once(&o, handle)
	case "load":
		return false, load(&o)
	}
	return false, fmt.Errorf("%w: no command %q", errUsage, args[0])
}

type options struct {
	address, roots, name   string
	tls12, tls13           bool
	tokenFile, token       string
	authorizations         list
	certificate            string
	cluster                string
	headers                list
	keyKind, csrFile, san  string
	ttl                    int64
	metadata               list
	metadataJSON           string
	expect                 string
	out                    string
	timeout                time.Duration
	connections, inFlight  int
	newConnectionEach, gcp bool
}

type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(v string) error { *l = append(*l, v); return nil }

func (o *options) flags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(os.Stderr)
	flags.StringVar(&o.address, "address", "127.0.0.1:15012", "the server")
	flags.StringVar(&o.roots, "roots", "", "PEM file of the roots that the server's certificate must lead to")
	flags.StringVar(&o.name, "name", "", "the name that the server's certificate must have")
	flags.BoolVar(&o.tls12, "tls12", false, "TLS 1.2 and nothing later")
	flags.BoolVar(&o.tls13, "tls13", false, "TLS 1.3 and nothing earlier")
	flags.StringVar(&o.tokenFile, "token-file", "", "a file with a token, read for each request")
	flags.StringVar(&o.token, "token", "", "a token, whatever it is")
	flags.Var(&o.authorizations, "authorization", "a whole authorization header; may be repeated")
	flags.StringVar(&o.certificate, "certificate", "", "folder with cert-chain.pem and key.pem, for mutual TLS")
	flags.StringVar(&o.cluster, "cluster", "Kubernetes", "clusterid; empty for none")
	flags.Var(&o.headers, "header", "NAME=VALUE: further metadata of the call; may be repeated")
	flags.StringVar(&o.keyKind, "key-kind", "p256", "p256, p384, p521, ed25519, rsa2048, rsa3072, rsa4096, or rsa1024")
	flags.StringVar(&o.csrFile, "csr", "", "send this file as it is; the key is somebody else's")
	flags.StringVar(&o.san, "san", "", "the URI that the CSR names")
	flags.Int64Var(&o.ttl, "ttl", 86400, "validity_duration, in seconds")
	flags.Var(&o.metadata, "metadata", "KEY=VALUE: a string of the request's metadata; may be repeated")
	flags.StringVar(&o.metadataJSON, "metadata-json", "", "the request's metadata as a JSON object, instead")
	flags.StringVar(&o.expect, "expect", "", "the SPIFFE ID that the certificate must have")
	flags.StringVar(&o.out, "out", "", "folder to write key.pem, cert-chain.pem and root-cert.pem to, as OUTPUT_CERTS")
	flags.DurationVar(&o.timeout, "timeout", 20*time.Second, "of one call")
	flags.IntVar(&o.connections, "connections", 1, "load: so many connections, kept open")
	flags.IntVar(&o.inFlight, "in-flight", 1, "load: so many calls at once on each connection")
	flags.BoolVar(&o.newConnectionEach, "new-connection-each", false, "load: a new connection for each call")
	flags.BoolVar(&o.gcp, "gcp", false, "handle: with a credential of Google's metadata server")
	return flags
}

func (o *options) dial() (*grpc.ClientConn, error) {
	pem, err := os.ReadFile(o.roots)
	if err != nil {
		return nil, fmt.Errorf("%w: --roots: %v", errUsage, err)
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: o.name}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%w: no certificate in %s", errUsage, o.roots)
	}
	if o.tls12 {
		config.MaxVersion = tls.VersionTLS12
	}
	if o.tls13 {
		config.MinVersion = tls.VersionTLS13
	}
	if o.certificate != "" {
		// As the agent does: the folder is read for each handshake, and what is in it is shown whatever it is.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			folder := o.certificate
			if set, err := filepath.EvalSymlinks(filepath.Join(folder, "..data")); err == nil {
				folder = set
			}
			pair, err := tls.LoadX509KeyPair(filepath.Join(folder, "cert-chain.pem"), filepath.Join(folder, "key.pem"))
			return &pair, err
		}
	}
	return grpc.NewClient(o.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
}

// headers gives the call's metadata: what Istio's agent sends, and whatever else was asked for.
func (o *options) callMetadata() (metadata.MD, error) {
	md := metadata.MD{}
	if o.cluster != "" {
		md.Append("ClusterID", o.cluster)
	}
	if o.tokenFile != "" {
		token, err := os.ReadFile(o.tokenFile)
		if err != nil {
			return nil, err
		}
		md.Append("authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	if o.token != "" {
		md.Append("authorization", "Bearer "+o.token)
	}
	md.Append("authorization", o.authorizations...)
	for _, header := range o.headers {
		name, value, ok := strings.Cut(header, "=")
		if !ok {
			return nil, fmt.Errorf("%w: --header %q", errUsage, header)
		}
		md.Append(name, value)
	}
	return md, nil
}

type call func(o *options, connection *grpc.ClientConn) (*granted, error)

func once(o *options, ask call) (refused bool, err error) {
	connection, err := o.dial()
	if err != nil {
		return false, err
	}
	defer connection.Close()
	result, err := ask(o, connection)
	if err != nil {
		if _, fromServer := status.FromError(err); !fromServer {
			return false, err
		}
		return true, show(refusalOf(err))
	}
	if o.out != "" {
		if err := result.write(o.out); err != nil {
			return false, err
		}
	}
	return false, show(result)
}

// refusal is how a server says no.
type refusal struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Reason  string `json:"reason"`
	Domain  string `json:"domain"`
}

func refusalOf(err error) refusal {
	said := status.Convert(err)
	result := refusal{Code: said.Code().String(), Message: said.Message()}
	for _, detail := range said.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			result.Reason, result.Domain = info.GetReason(), info.GetDomain()
		}
	}
	return result
}

func show(what any) error {
	text, err := json.Marshal(what)
	if err != nil {
		return err
	}
	fmt.Println(string(text))
	return nil
}
