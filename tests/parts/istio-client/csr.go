package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"os"
)

// request makes a key and its CSR, or reads a CSR without a key.
func (o *options) request() (crypto.Signer, []byte, error) {
	if o.csrFile != "" {
		text, err := os.ReadFile(o.csrFile)
		return nil, text, err
	}
	key, err := newKey(o.keyKind)
	if err != nil {
		return nil, nil, err
	}
	// Istio's agent names its identity and leaves the subject's organization empty.
	template := &x509.CertificateRequest{}
	if o.san != "" {
		uri, err := url.Parse(o.san)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: --san: %v", errUsage, err)
		}
		template.URIs = []*url.URL{uri}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

func newKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "p256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "p384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "p521":
		return ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "ed25519":
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	case "rsa1024":
		return rsa.GenerateKey(rand.Reader, 1024)
	case "rsa2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	case "rsa3072":
		return rsa.GenerateKey(rand.Reader, 3072)
	case "rsa4096":
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, fmt.Errorf("%w: no key kind %q", errUsage, kind)
}
