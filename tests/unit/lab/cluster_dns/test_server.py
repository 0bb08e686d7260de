"""Messages as an independent resolver library writes and reads them."""

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from vmnet.lab.cluster_dns.records import Names, names
from vmnet.lab.cluster_dns.server import Server, answer, limited, parse

SERVICE = {
    "metadata": {"namespace": "ns", "name": "web"},
    "spec": {"clusterIPs": ["10.96.0.7", "fd00:10:96::7"], "ports": [{"name": "http", "port": 80}]},
}


@pytest.fixture
def known() -> Names:
    return names([SERVICE], [], "cluster.local")


def ask(known: Names, name: str, kind: str) -> dns.message.Message | None:
    request = parse(dns.message.make_query(name, kind).to_wire())
    assert request is not None
    reply = answer(request, known)
    return None if reply is None else dns.message.from_wire(bytes(reply.pack()))


@pytest.mark.parametrize(("kind", "address"), [("A", "10.96.0.7"), ("AAAA", "fd00:10:96::7")])
def test_addresses(known: Names, kind: str, address: str) -> None:
    reply = ask(known, "web.ns.svc.cluster.local.", kind)
    assert reply is not None
    assert reply.rcode() == dns.rcode.NOERROR
    assert reply.flags & dns.flags.AA
    assert [item.to_text() for rrset in reply.answer for item in rrset] == [address]
    assert reply.answer[0].ttl == 5


def test_a_service_record_brings_the_addresses_of_its_target(known: Names) -> None:
    reply = ask(known, "_http._tcp.web.ns.svc.cluster.local.", "SRV")
    assert reply is not None
    assert [item.to_text() for item in reply.answer[0]] == ["0 100 80 web.ns.svc.cluster.local."]
    assert {item.to_text() for rrset in reply.additional for item in rrset} == {"10.96.0.7", "fd00:10:96::7"}


@pytest.mark.parametrize(
    ("name", "code"), [("web.ns.svc.cluster.local.", "NOERROR"), ("no.ns.svc.cluster.local.", "NXDOMAIN")]
)
def test_negative_answers_can_be_cached(known: Names, name: str, code: str) -> None:
    reply = ask(known, name, "TXT")
    assert reply is not None
    assert dns.rcode.to_text(reply.rcode()) == code
    assert not reply.answer
    assert [rrset.rdtype for rrset in reply.authority] == [dns.rdatatype.SOA]


def test_other_names_are_asked_elsewhere(known: Names) -> None:
    assert ask(known, "www.outside.test.", "A") is None


def test_garbage_and_replies_are_not_answered() -> None:
    query = dns.message.make_query("web.ns.svc.cluster.local.", "A")
    reply = dns.message.make_response(query)
    assert parse(b"") is None
    assert parse(b"\xff" * 40) is None
    assert parse(reply.to_wire()) is None


def test_what_does_not_fit_into_a_datagram_is_cut() -> None:
    endpoints = [{"addresses": [f"10.244.1.{number}"]} for number in range(1, 200)]
    service = {"metadata": {"namespace": "ns", "name": "many"}, "spec": {"clusterIPs": ["None"]}}
    labels = {"kubernetes.io/service-name": "many"}
    found = names(
        [service],
        [{"metadata": {"namespace": "ns", "name": "x", "labels": labels}, "endpoints": endpoints}],
        "cluster.local",
    )
    for payload, cut in ((0, True), (1232, True), (16384, False)):
        query = dns.message.make_query(
            "many.ns.svc.cluster.local.", "A", use_edns=0 if payload else -1, payload=payload
        )
        request = parse(query.to_wire())
        assert request is not None
        reply = answer(request, found)
        assert reply is not None
        data = limited(reply, request)
        assert bool(dns.message.from_wire(data).flags & dns.flags.TC) is cut
        assert len(data) <= max(512, payload)


async def test_without_an_upstream_the_answer_is_a_failure(known: Names) -> None:
    server = Server(lambda: known, ())
    reply = await server.reply_to_datagram(dns.message.make_query("www.outside.test.", "A").to_wire())
    assert reply is not None
    assert dns.message.from_wire(reply).rcode() == dns.rcode.SERVFAIL
