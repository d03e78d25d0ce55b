package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"
)

// create asks IstioCertificateService, and judges the answer.
func create(o *options, connection *grpc.ClientConn) (*granted, error) {
	key, csr, err := o.request()
	if err != nil {
		return nil, err
	}
	fields, err := o.requestMetadata()
	if err != nil {
		return nil, err
	}
	md, err := o.callMetadata()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), md), o.timeout)
	defer cancel()
	answer, err := security.NewIstioCertificateServiceClient(connection).CreateCertificate(ctx,
		&security.IstioCertificateRequest{Csr: string(csr), ValidityDuration: o.ttl, Metadata: fields})
	if err != nil {
		return nil, err
	}
	return judgeElements(answer.GetCertChain(), key, o.expect)
}

// requestMetadata is what the agent puts into the request: always CertSigner, empty where none is configured.
func (o *options) requestMetadata() (*structpb.Struct, error) {
	fields := map[string]any{"CertSigner": ""}
	if o.metadataJSON != "" {
		fields = map[string]any{}
		if err := json.Unmarshal([]byte(o.metadataJSON), &fields); err != nil {
			return nil, fmt.Errorf("%w: --metadata-json: %v", errUsage, err)
		}
	}
	for _, pair := range o.metadata {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("%w: --metadata %q", errUsage, pair)
		}
		fields[name] = value
	}
	return structpb.NewStruct(fields)
}
