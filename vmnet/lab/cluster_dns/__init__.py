"""The lab's stand-in for CoreDNS: names of Services and Pods of the default network, and a forwarder for the rest."""
