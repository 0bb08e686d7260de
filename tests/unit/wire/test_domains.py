"""Name lists: against scapy's and dnspython's reading, and against anything a guest may send."""

import dns.name
import dns.wire
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet.wire import domains
from vmnet.wire.malformed import Malformed

SEARCH = ("blue.vm.cluster.local", "vm.cluster.local", "blue.svc.cluster.local", "svc.cluster.local", "cluster.local")
LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63)
NAMES = st.lists(st.lists(LABELS, min_size=1, max_size=3).map(".".join), max_size=6).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(NAMES)
def test_lists_come_back(names: tuple[str, ...]) -> None:
    assert domains.decode_names(domains.encode_names(names)) == names
    assert domains.decode_names(domains.encode_compressed(names), compressed=True) == names
    assert len(domains.encode_compressed(names)) <= len(domains.encode_names(names))


def test_compression_is_what_dnspython_reads() -> None:
    data = domains.encode_compressed(SEARCH)
    assert len(data) < 60 < len(domains.encode_names(SEARCH))
    parser = dns.wire.Parser(data)
    found = []
    while parser.remaining():
        found.append(dns.name.from_wire_parser(parser).to_text(omit_final_dot=True))
    assert tuple(found) == SEARCH


def test_padding_ends_a_padded_list_and_nothing_else() -> None:
    data = domains.encode_names(("a.b",)) + bytes(3)
    assert domains.decode_names(data, padded=True) == ("a.b",)
    with pytest.raises(Malformed):
        domains.decode_names(data + b"\1", padded=True)


@pytest.mark.parametrize(
    "data",
    [
        b"\x05abc",
        b"\x03abc",
        b"\xc0",
        b"\xc0\x00",
        b"\x01a\xc0\x00",
        b"\x40" + b"a" * 64 + b"\0",
        b"\x03a.b\0",
        b"\x02a\n\0",
        (b"\x3f" + b"a" * 63) * 4 + b"\0",
    ],
    ids=["short", "no-root", "half-pointer", "self", "loop", "long-label", "dot", "control", "long-name"],
)
def test_what_is_no_name_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        domains.decode_names(data, compressed=True)


def test_pointers_need_permission() -> None:
    with pytest.raises(Malformed):
        domains.decode_names(b"\x01a\0\xc0\x00")


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.binary(max_size=80), st.booleans(), st.booleans())
def test_nothing_else_is_raised(data: bytes, compressed: bool, padded: bool) -> None:
    try:
        names = domains.decode_names(data, compressed=compressed, padded=padded)
    except Malformed:
        return
    assert all(len(name) < domains.MAX_NAME for name in names)


@pytest.mark.parametrize("name", ["", "a..b", "a" * 64, ".".join(["a" * 63] * 4), "ü.de"])
def test_what_dns_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        domains.encode_name(name)
