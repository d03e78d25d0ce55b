package main

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// granted is a certificate that an agent can use.
type granted struct {
	ID            string   `json:"id"`
	Serial        string   `json:"serial"`
	NotBefore     string   `json:"not_before"`
	NotAfter      string   `json:"not_after"`
	Seconds       int64    `json:"seconds"`
	DNS           []string `json:"dns"`
	Subject       string   `json:"subject"`
	Issuer        string   `json:"issuer"`
	KeyAlgorithm  string   `json:"key_algorithm"`
	Intermediates int      `json:"intermediates"`
	Roots         int      `json:"roots"`
	IsCA          bool     `json:"is_ca"`

	chain, bundle []byte
	key           crypto.Signer
}

// judgeElements is for CreateCertificate's answer.
func judgeElements(elements []string, key crypto.Signer, expect string) (*granted, error) {
	// pilot-agent: the last element is the root, those before it are the chain.
	if len(elements) < 2 {
		return nil, fmt.Errorf("cert_chain has %d elements; pilot-agent wants more than one", len(elements))
	}
	last := len(elements) - 1
	var chain []byte
	for i, element := range elements[:last] {
		// ztunnel parses the first certificate of each element, so a second one would be lost.
		if err := exactlyOne(element); err != nil {
			return nil, fmt.Errorf("element %d of cert_chain: %w", i, err)
		}
		chain = append(chain, element...)
	}
	bundle := []byte(elements[last])
	if len(bundle) == 0 || bundle[len(bundle)-1] != '\n' {
		return nil, fmt.Errorf("the trust bundle does not end in a newline")
	}
	return judge(chain, bundle, key, expect)
}

// judgeBlob is for HandleCSR's answer, which has no roots: the node agent keeps those that it has.
func judgeBlob(chain []byte, rootsFile string, key crypto.Signer, expect string) (*granted, error) {
	bundle, err := os.ReadFile(rootsFile)
	if err != nil {
		return nil, err
	}
	return judge(chain, bundle, key, expect)
}

func exactlyOne(element string) error {
	block, rest := pem.Decode([]byte(element))
	if block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 {
		return fmt.Errorf("it is no PEM certificate: %q", element)
	}
	if len(rest) > 0 {
		return fmt.Errorf("something follows its certificate: %q", rest)
	}
	if string(pem.EncodeToMemory(block)) != element {
		return fmt.Errorf("it is not what Go would write, with a newline at its end: %q", element)
	}
	return nil
}

func judge(chainPEM, bundlePEM []byte, key crypto.Signer, expect string) (*granted, error) {
	chain, err := parseAll(chainPEM)
	if err != nil {
		return nil, fmt.Errorf("the chain: %w", err)
	}
	bundle, err := parseAll(bundlePEM)
	if err != nil {
		return nil, fmt.Errorf("the trust bundle: %w", err)
	}
	leaf := chain[0]
	for _, above := range chain[1:] {
		for _, root := range bundle {
			if above.Equal(root) {
				return nil, fmt.Errorf("the root %s stands in the chain, too", root.Subject)
			}
		}
	}
	if len(leaf.URIs) != 1 {
		return nil, fmt.Errorf("the leaf has the URIs %v, and should have one", leaf.URIs)
	}
	id := leaf.URIs[0].String()
	if expect != "" && id != expect {
		return nil, fmt.Errorf("the leaf is %s's, not %s's", id, expect)
	}
	if leaf.IsCA {
		return nil, fmt.Errorf("the leaf is a CA's")
	}
	if key != nil {
		public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
		if !ok || !public.Equal(leaf.PublicKey) {
			return nil, fmt.Errorf("the leaf is for another key")
		}
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range bundle {
		roots.AddCert(root)
	}
	for _, above := range chain[1:] {
		intermediates.AddCert(above)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		options := x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}
		if _, err := leaf.Verify(options); err != nil {
			return nil, fmt.Errorf("crypto/x509, extended key usage %d: %w", usage, err)
		}
	}
	return &granted{
		ID:            id,
		Serial:        fmt.Sprintf("%x", leaf.SerialNumber),
		NotBefore:     leaf.NotBefore.UTC().Format(time.RFC3339),
		NotAfter:      leaf.NotAfter.UTC().Format(time.RFC3339),
		Seconds:       int64(time.Until(leaf.NotAfter).Round(time.Second) / time.Second),
		DNS:           leaf.DNSNames,
		Subject:       leaf.Subject.String(),
		Issuer:        leaf.Issuer.String(),
		KeyAlgorithm:  leaf.PublicKeyAlgorithm.String(),
		Intermediates: len(chain) - 1,
		Roots:         len(bundle),
		IsCA:          leaf.IsCA,
		chain:         chainPEM,
		bundle:        bundlePEM,
		key:           key,
	}, nil
}

func parseAll(text []byte) ([]*x509.Certificate, error) {
	var found []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		found, text = append(found, certificate), rest
	}
	if len(found) == 0 || len(bytes.TrimSpace(text)) > 0 {
		return nil, fmt.Errorf("%d certificates, and then %q", len(found), text)
	}
	return found, nil
}

// write does what pilot-agent does with OUTPUT_CERTS.
func (g *granted) write(folder string) error {
	if g.key == nil {
		return fmt.Errorf("%w: --out needs a key of our own", errUsage)
	}
	der, err := x509.MarshalPKCS8PrivateKey(g.key)
	if err != nil {
		return err
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	for name, text := range map[string][]byte{"key.pem": key, "cert-chain.pem": g.chain, "root-cert.pem": g.bundle} {
		if err := os.WriteFile(filepath.Join(folder, name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}
