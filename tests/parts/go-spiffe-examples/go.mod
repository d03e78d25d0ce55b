module go-spiffe-examples

go 1.24.0

tool (
	github.com/spiffe/go-spiffe/v2/examples/spiffe-grpc/client
	github.com/spiffe/go-spiffe/v2/examples/spiffe-grpc/server
	github.com/spiffe/go-spiffe/v2/examples/spiffe-http/client
	github.com/spiffe/go-spiffe/v2/examples/spiffe-http/server
	github.com/spiffe/go-spiffe/v2/examples/spiffe-jwt-using-proxy/client
	github.com/spiffe/go-spiffe/v2/examples/spiffe-jwt-using-proxy/proxy
	github.com/spiffe/go-spiffe/v2/examples/spiffe-jwt-using-proxy/server
	github.com/spiffe/go-spiffe/v2/examples/spiffe-jwt/client
	github.com/spiffe/go-spiffe/v2/examples/spiffe-jwt/server
	github.com/spiffe/go-spiffe/v2/examples/spiffe-tls/client
	github.com/spiffe/go-spiffe/v2/examples/spiffe-tls/server
	github.com/spiffe/go-spiffe/v2/examples/spiffe-watcher
)

require (
	github.com/Microsoft/go-winio v0.6.2 // indirect
	github.com/go-jose/go-jose/v4 v4.1.5 // indirect
	github.com/spiffe/go-spiffe/v2 v2.9.0 // indirect
	golang.org/x/net v0.48.0 // indirect
	golang.org/x/sys v0.39.0 // indirect
	golang.org/x/text v0.32.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20251202230838-ff82c1b0f217 // indirect
	google.golang.org/grpc v1.79.3 // indirect
	google.golang.org/grpc/examples v0.0.0-20250407062114-b368379ef8f6 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)
