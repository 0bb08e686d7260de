"""The kernel seam: the only code that speaks netlink, loads nftables and opens raw sockets."""
