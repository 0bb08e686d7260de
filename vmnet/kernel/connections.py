"""Whose connections a network namespace's conntrack knows."""

import ipaddress
import re
from pathlib import Path
from typing import Final

from vmnet.model.addresses import IPAddress

PATH: Final = Path("/proc/thread-self/net/nf_conntrack")
"""Of the calling thread's namespace; only where the kernel has CONFIG_NF_CONNTRACK_PROCFS."""
_ENDS: Final = re.compile(r"\b(?:src|dst)=(\S+)")


def read() -> frozenset[IPAddress]:
    """Both ends of every established TCP connection, before and after translation; empty where nobody tells."""
    try:
        return parse(PATH.read_text())
    except FileNotFoundError:
        return frozenset()


def parse(text: str) -> frozenset[IPAddress]:
    """The same, of the file's text."""
    found = set()
    for line in text.splitlines():
        words = line.split(None, 6)
        if len(words) > 5 and words[2] == "tcp" and words[5] == "ESTABLISHED":
            found.update(_ENDS.findall(line))
    return frozenset(ipaddress.ip_address(text) for text in found)
