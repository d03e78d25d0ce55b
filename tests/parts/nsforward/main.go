// nsforward PID ADDRESS
//
// A door into the network namespace of a process: listens on a free port of 127.0.0.1, says where, and forwards each
// connection to ADDRESS as that process would reach it. It ends when the process is gone and somebody knocks.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: nsforward PID ADDRESS")
	}
	namespace, address := "/proc/"+os.Args[1]+"/ns/net", os.Args[2]
	if _, err := os.Stat(namespace); err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr())
	for {
		outer, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer outer.Close()
			inner, err := dial(namespace, address)
			if errors.Is(err, fs.ErrNotExist) {
				log.Fatal(err)
			}
			if err != nil {
				log.Print(err)
				return
			}
			defer inner.Close()
			go pass(inner, outer)
			pass(outer, inner)
		}()
	}
}

// dial connects from within a network namespace. A thread that has entered it never leaves, and ends with its goroutine.
func dial(namespace, address string) (inner net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		var file *os.File
		if file, err = os.Open(namespace); err != nil {
			return
		}
		defer file.Close()
		if err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err == nil {
			inner, err = net.Dial("tcp", address)
		}
	}()
	<-done
	return
}

// pass copies until the source says that it has no more, and says so to the other.
func pass(to, from net.Conn) {
	io.Copy(to, from)
	to.(*net.TCPConn).CloseWrite()
}
