// Command coredns is CoreDNS with the plugins that a cluster's names need and no others.
package main

import (
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
)

// The order in which plugins see a query: upstream's (plugin.cfg), but for template, which comes last
// and refuses what the cluster does not know.
func init() {
	dnsserver.Directives = []string{
		"health", "ready", "errors", "cache", "loadbalance", "kubernetes", "template",
	}
}

func main() { coremain.Run() }
