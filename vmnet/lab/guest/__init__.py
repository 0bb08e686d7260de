"""The lab's guest: a Debian kernel with an initramfs, the traffic probe, and the host's side of its command agent."""
