import dns.flags
import dns.message
import dns.name
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet_dns import message
from vmnet_dns.message import Malformed, Rcode


def test_names_are_as_dnspython_writes_them() -> None:
    for text in ("Blue.Red-Namespace.vm.cluster.local", "a." * 100, "x" * 63 + ".org", "."):
        assert message.encode_name(text) == dns.name.from_text(text).to_wire().lower()


@pytest.mark.parametrize("text", ["a..b", "x" * 64, ".a", "a." * 128, "ü.de"])
def test_bad_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        message.encode_name(text)


def test_parents() -> None:
    assert [message.decode_name(name) for name in message.parents(message.encode_name("a.b.c"))] == [
        "a.b.c.",
        "b.c.",
        "c.",
        ".",
    ]


@pytest.mark.parametrize("edns", [False, True])
def test_a_query_of_dnspython_is_understood(edns: bool) -> None:
    wire = dns.message.make_query("Red.Example", "AAAA", use_edns=edns, payload=4096, want_dnssec=edns).to_wire()
    query = message.parse_query(wire)
    assert query.name == message.encode_name("red.example")
    assert query.question[:4] == b"\x03Red"
    assert (query.type, query.klass, query.edns, query.dnssec) == (28, 1, edns, edns)
    assert query.size == (4096 if edns else 512)


def test_options_and_other_additional_records_are_passed_over() -> None:
    made = dns.message.make_query("red.example", "A", use_edns=0, payload=10)
    made.use_edns(0, payload=10, options=[dns.edns.CookieOption(b"12345678", b"")])
    query = message.parse_query(made.to_wire())
    assert query.edns
    assert query.size == 512


HEAD = b"\x12\x34\x01\x00"
NAME = b"\x03red\x00"
QUESTION = NAME + b"\x00\x01\x00\x01"
OPT = b"\x00\x00\x29\x10\x00\x00\x00\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (b"", None),
        (HEAD, None),
        (b"\x12\x34\x81\x00\x00\x01" + bytes(6) + QUESTION, None),
        (b"\x12\x34\x29\x00\x00\x01" + bytes(6) + QUESTION, Rcode.NOTIMP),
        (HEAD + b"\x00\x00" + bytes(6), Rcode.FORMERR),
        (HEAD + b"\x00\x02" + bytes(6) + QUESTION * 2, Rcode.FORMERR),
        (HEAD + b"\x00\x01\x00\x01" + bytes(4) + QUESTION + OPT, Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(6) + NAME, Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(6) + b"\x3f" + QUESTION, Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(6) + b"\xc0\x0c\x00\x01\x00\x01", Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(6) + b"\x01a" * 130 + b"\x00\x00\x01\x00\x01", Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(6) + QUESTION + b"junk", Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(4) + b"\x00\x01" + QUESTION, Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(4) + b"\x00\x02" + QUESTION + OPT * 2, Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(4) + b"\x00\x01" + QUESTION + NAME + OPT[1:], Rcode.FORMERR),
        (HEAD + b"\x00\x01" + bytes(4) + b"\x00\x01" + QUESTION + OPT[:-1] + b"\x05", Rcode.FORMERR),
    ],
)
def test_what_is_malformed_says_what_it_deserves(wire: bytes, rcode: Rcode | None) -> None:
    with pytest.raises(Malformed) as caught:
        message.parse_query(wire)
    assert caught.value.rcode == rcode


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_a_query_or_malformed_and_nothing_else(wire: bytes) -> None:
    try:
        query = message.parse_query(wire)
    except Malformed:
        return
    assert wire[12 : 12 + len(query.question)] == query.question


def test_types_and_rcodes_of_clients_cannot_make_endless_labels() -> None:
    assert {message.type_name(number) for number in range(65536)} == {"other", *(item.name for item in message.Type)}
    assert {message.rcode_name(number) for number in range(4096)} == {"other", *(item.name for item in Rcode)}
