"""One node: CNI requests, datapath, guest services, cut-over."""
