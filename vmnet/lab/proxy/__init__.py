"""One process on each node, in the place of kube-proxy and of MetalLB's speaker."""
