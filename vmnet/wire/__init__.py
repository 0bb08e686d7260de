"""Codecs: bytes to values and back. No sockets, no clock.

Each module reads what guests send (strictly: anything odd is ``Malformed``) and writes what the node sends, as whole
Ethernet frames with full checksums. They are written with ``struct``: scapy's dhcp and inet6 layers cost 0.5 s of
import and 0.4 ms per message, and read leniently; the tests hold these codecs against scapy and tshark instead.
"""
