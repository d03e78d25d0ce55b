package main

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

const handleCSR = "/istio.v1.auth.IstioCAService/HandleCSR"

// handle asks IstioCAService as istio/auth 0.2.10 defined it. istio.io/api no longer has it, so the messages are encoded
// by hand: Request{1: csr_pem, 2: {1: {1: signed_instance_metadata}}}.
func handle(o *options, connection *grpc.ClientConn) (*granted, error) {
	key, csr, err := o.request()
	if err != nil {
		return nil, err
	}
	request := appendBytes(nil, 1, csr)
	if o.gcp {
		instance := appendBytes(nil, 1, []byte("signed metadata"))
		request = appendBytes(request, 2, appendBytes(nil, 1, instance))
	}
	md, err := o.callMetadata()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), md), o.timeout)
	defer cancel()
	var answer []byte
	if err := connection.Invoke(ctx, handleCSR, &request, &answer, grpc.ForceCodec(asItIs{})); err != nil {
		return nil, err
	}
	approved, chain, err := response(answer)
	if err != nil {
		return nil, err
	}
	// The node agent looks at this before it looks at the chain.
	if !approved {
		return nil, fmt.Errorf("is_approved is false, and there was no error")
	}
	return judgeBlob(chain, o.roots, key, o.expect)
}

// response reads Response{1: is_approved, 2: status, 3: signed_cert_chain}.
func response(message []byte) (approved bool, chain []byte, err error) {
	for len(message) > 0 {
		number, kind, length := protowire.ConsumeTag(message)
		if length < 0 {
			return false, nil, protowire.ParseError(length)
		}
		message = message[length:]
		switch {
		case number == 1 && kind == protowire.VarintType:
			var value uint64
			value, length = protowire.ConsumeVarint(message)
			approved = value == 1
		case number == 3 && kind == protowire.BytesType:
			chain, length = protowire.ConsumeBytes(message)
		case number == 2 && kind == protowire.BytesType:
			_, length = protowire.ConsumeBytes(message)
		default:
			return false, nil, fmt.Errorf("the answer has a field %d of type %d, which 0.2.10 does not know", number, kind)
		}
		if length < 0 {
			return false, nil, protowire.ParseError(length)
		}
		message = message[length:]
	}
	return approved, chain, nil
}

func appendBytes(to []byte, number protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(to, number, protowire.BytesType), value)
}

// asItIs is a codec for messages that are bytes already.
type asItIs struct{}

func (asItIs) Name() string { return "proto" }

func (asItIs) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }

func (asItIs) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = append([]byte(nil), data...)
	return nil
}
