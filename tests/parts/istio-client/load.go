package main

import (
	"fmt"
	"io"
	"os"
	"sync"

	"google.golang.org/grpc"
)

// seen is one line of load: after so many answers, certificates came of an issuer that there were none of before.
type seen struct {
	Issuer   string `json:"issuer"`
	Answered int    `json:"answered"`
}

// total is the last line of load.
type total struct {
	Answered int            `json:"answered"`
	Failed   int            `json:"failed"`
	Faults   map[string]int `json:"faults"`
	Issuers  map[string]int `json:"issuers"`
}

// load asks until standard input ends, on connections that stay open, and judges every answer.
func load(o *options) error {
	stop := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	sum := total{Faults: map[string]int{}, Issuers: map[string]int{}}
	var mutex sync.Mutex
	count := func(result *granted, err error) error {
		mutex.Lock()
		defer mutex.Unlock()
		if err != nil {
			sum.Failed++
			if len(sum.Faults) < 20 {
				sum.Faults[err.Error()]++
			}
			return nil
		}
		sum.Answered++
		sum.Issuers[result.Issuer]++
		if sum.Issuers[result.Issuer] == 1 {
			return show(seen{result.Issuer, sum.Answered})
		}
		return nil
	}
	var workers sync.WaitGroup
	faults := make(chan error, o.connections*o.inFlight)
	for range o.connections {
		connection, err := o.dial()
		if err != nil {
			return err
		}
		defer connection.Close()
		for range o.inFlight {
			workers.Add(1)
			go func() {
				defer workers.Done()
				for {
					select {
					case <-stop:
						return
					default:
					}
					if err := count(o.one(connection)); err != nil {
						faults <- err
						return
					}
				}
			}()
		}
	}
	workers.Wait()
	close(faults)
	for err := range faults {
		return err
	}
	if err := show(sum); err != nil {
		return err
	}
	if sum.Failed > 0 {
		return fmt.Errorf("%d of %d calls failed", sum.Failed, sum.Failed+sum.Answered)
	}
	return nil
}

func (o *options) one(connection *grpc.ClientConn) (*granted, error) {
	if !o.newConnectionEach {
		return create(o, connection)
	}
	fresh, err := o.dial()
	if err != nil {
		return nil, err
	}
	defer fresh.Close()
	return create(o, fresh)
}
