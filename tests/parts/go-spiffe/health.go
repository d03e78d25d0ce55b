package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// health asks a gRPC server how it is, over TLS of the version that is named, and prints its answer. With --watch it
// prints each answer of a stream, until the server ends it.
func health(args []string) error {
	flags := newFlags("health")
	roots := flags.String("roots", "", "PEM file of the roots that the server's certificate must lead to")
	name := flags.String("name", "", "the name that the server's certificate must have")
	tls12 := flags.Bool("tls12", false, "TLS 1.2 and nothing later")
	service := flags.String("service", "", "the service to ask for; the whole server where none is given")
	watch := flags.Bool("watch", false, "follow it")
	positional, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(*roots)
	if err != nil {
		return err
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: *name}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("no certificate in %s", *roots)
	}
	if *tls12 {
		config.MaxVersion = tls.VersionTLS12
	}

	connection, err := grpc.NewClient(positional[0], grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return err
	}
	defer connection.Close()
	client := grpc_health_v1.NewHealthClient(connection)
	request := &grpc_health_v1.HealthCheckRequest{Service: *service}
	if *watch {
		stream, err := client.Watch(context.Background(), request)
		if err != nil {
			return err
		}
		for {
			answer, err := stream.Recv()
			if err != nil {
				return err
			}
			fmt.Println(answer.GetStatus())
		}
	}
	wait, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	answer, err := client.Check(wait, request)
	if err != nil {
		return err
	}
	fmt.Println(answer.GetStatus())
	return nil
}
