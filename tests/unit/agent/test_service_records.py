import struct
from ipaddress import ip_address
from typing import Any

import dns.message
import dns.rcode
import pytest

from vmnet.agent.service_records import records
from vmnet.model.service import Backend, Member, Service, ServicePort, parse
from vmnet_dns.answer import Transport, answer
from vmnet_dns.message import Type, encode_name, reverse_name
from vmnet_dns.zone import View

DOMAIN = "cluster.local"
PORT = ServicePort("http", "tcp", 80, backends=(Backend(ip_address("10.0.0.5"), 8080, "n1"),))


def found(*services: Service) -> set[tuple[bytes, int, bytes]]:
    return {(item.owner, item.type, item.data) for service in services for item in records(service, DOMAIN)}


def a(name: str, address: str) -> tuple[bytes, int, bytes]:
    packed = ip_address(address).packed
    return encode_name(f"{name}.{DOMAIN}"), Type.A if len(packed) == 4 else Type.AAAA, packed


def ptr(address: str, name: str) -> tuple[bytes, int, bytes]:
    return reverse_name(ip_address(address)), Type.PTR, encode_name(f"{name}.{DOMAIN}")


def srv(name: str, port: int, target: str) -> tuple[bytes, int, bytes]:
    data = struct.pack("!HHH", 0, 0, port) + encode_name(f"{target}.{DOMAIN}")
    return encode_name(f"{name}.{DOMAIN}"), Type.SRV, data


def test_a_service_has_its_cluster_addresses_and_its_named_ports() -> None:
    service = Service("red", "web", (ip_address("10.96.0.7"), ip_address("fd00:96::7")), (PORT,))
    assert found(service) == {
        a("web.red.svc", "10.96.0.7"),
        a("web.red.svc", "fd00:96::7"),
        ptr("10.96.0.7", "web.red.svc"),
        ptr("fd00:96::7", "web.red.svc"),
        srv("_http._tcp.web.red.svc", 80, "web.red.svc"),
    }


def test_a_headless_service_has_its_members_by_host_name_or_address() -> None:
    members = (Member(ip_address("10.0.0.5"), "web-0"), Member(ip_address("fd20::6")))
    assert found(Service("red", "web", (), (PORT,), members=members)) == {
        a("web.red.svc", "10.0.0.5"),
        a("web-0.web.red.svc", "10.0.0.5"),
        a("web.red.svc", "fd20::6"),
        a("fd20--6.web.red.svc", "fd20::6"),
        ptr("10.0.0.5", "web-0.web.red.svc"),
        ptr("fd20::6", "fd20--6.web.red.svc"),
        srv("_http._tcp.web.red.svc", 8080, "web-0.web.red.svc"),
    }


def test_an_external_name_is_an_alias() -> None:
    (record,) = records(Service("red", "web", (), (), alias="www.example.org"), DOMAIN)
    assert (record.type, record.data) == (Type.CNAME, encode_name("www.example.org"))


def test_a_name_that_dns_cannot_hold_hides_no_other() -> None:
    bad = Service("red", "x" * 64, (ip_address("10.96.0.8"),), ())
    assert found(bad, Service("red", "web", (ip_address("10.96.0.7"),), ())) == {
        a("web.red.svc", "10.96.0.7"),
        ptr("10.96.0.7", "web.red.svc"),
    }


def slice_of(*endpoints: dict[str, Any], port: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [port or {"name": "https", "protocol": "TCP", "port": 8443}],
    }


def one(address: str, hostname: str = "", *, ready: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"addresses": [address], "conditions": {"ready": ready}, "nodeName": "n1"}
    return {**found, "hostname": hostname} if hostname else found


def described(name: str, slices: list[dict[str, Any]] | None = None, **spec: Any) -> Service:
    return parse({"metadata": {"namespace": "default", "name": name}, "spec": spec}, slices or [])


HTTPS = {"name": "https", "protocol": "TCP", "port": 443}
# Objects as the API has them, and below what the Kubernetes DNS specification 1.1.0 wants of them, section by section.
OBJECTS = [
    described("kubernetes", clusterIPs=["10.3.0.1"], ports=[HTTPS]),
    described("dual", clusterIPs=["10.3.0.2", "fd00:96::2"], ports=[{"name": "dns", "protocol": "UDP", "port": 53}]),
    described("unnamed", clusterIPs=["10.3.0.3"], ports=[{"protocol": "TCP", "port": 80}]),
    described(
        "headless",
        [slice_of(one("10.3.10.1", "my-pet"), one("10.3.10.2"), one("10.3.10.3", "late", ready=False))],
        clusterIP="None",
        ports=[HTTPS],
    ),
    described(
        "every",
        [slice_of(one("10.3.11.1", "late", ready=False))],
        clusterIP="None",
        publishNotReadyAddresses=True,
        ports=[HTTPS],
    ),
    described("nobody", [slice_of(one("10.3.12.1", ready=False))], clusterIP="None", ports=[HTTPS]),
    described("foo", type="ExternalName", externalName="www.example.com"),
    described("inner", type="ExternalName", externalName="kubernetes.default.svc.cluster.local"),
]  # fmt: skip
D = "default.svc.cluster.local"


@pytest.mark.parametrize(
    ("name", "kind", "rcode", "answers"),
    [
        # 2.2 schema version: tests/unit/agent/test_responder.py
        # 2.3.1 addresses of Services with a cluster address
        (f"kubernetes.{D}", "A", "NOERROR", {"10.3.0.1"}),
        (f"kubernetes.{D}", "AAAA", "NOERROR", set()),
        (f"dual.{D}", "A", "NOERROR", {"10.3.0.2"}),
        (f"dual.{D}", "AAAA", "NOERROR", {"fd00:96::2"}),
        (f"missing.{D}", "A", "NXDOMAIN", set()),
        ("kubernetes.missing.svc.cluster.local", "A", "NXDOMAIN", set()),
        # 2.3.2 SRV of named ports, and of those only
        (f"_https._tcp.kubernetes.{D}", "SRV", "NOERROR", {f"0 0 443 kubernetes.{D}."}),
        (f"_dns._udp.dual.{D}", "SRV", "NOERROR", {f"0 0 53 dual.{D}."}),
        (f"_https._udp.kubernetes.{D}", "SRV", "NXDOMAIN", set()),
        (f"_http._tcp.unnamed.{D}", "SRV", "NXDOMAIN", set()),
        (f"unnamed.{D}", "A", "NOERROR", {"10.3.0.3"}),
        # 2.3.3 PTR of cluster addresses
        ("1.0.3.10.in-addr.arpa", "PTR", "NOERROR", {f"kubernetes.{D}."}),
        (ip_address("fd00:96::2").reverse_pointer, "PTR", "NOERROR", {f"dual.{D}."}),
        # 2.4.1 addresses of headless Services: of ready endpoints, and of each by its name
        (f"headless.{D}", "A", "NOERROR", {"10.3.10.1", "10.3.10.2"}),
        (f"my-pet.headless.{D}", "A", "NOERROR", {"10.3.10.1"}),
        (f"10-3-10-2.headless.{D}", "A", "NOERROR", {"10.3.10.2"}),
        (f"late.headless.{D}", "A", "NXDOMAIN", set()),
        (f"every.{D}", "A", "NOERROR", {"10.3.11.1"}),
        (f"late.every.{D}", "A", "NOERROR", {"10.3.11.1"}),
        (f"nobody.{D}", "A", "NXDOMAIN", set()),
        # 2.4.2 SRV of headless Services: the port of the endpoint, one record for each
        (f"_https._tcp.headless.{D}", "SRV", "NOERROR",
         {f"0 0 8443 my-pet.headless.{D}.", f"0 0 8443 10-3-10-2.headless.{D}."}),
        # 2.4.3 PTR of endpoints
        ("1.10.3.10.in-addr.arpa", "PTR", "NOERROR", {f"my-pet.headless.{D}."}),
        ("3.10.3.10.in-addr.arpa", "PTR", "NXDOMAIN", set()),
        # 2.5 external names
        (f"foo.{D}", "CNAME", "NOERROR", {"www.example.com."}),
        (f"inner.{D}", "A", "NOERROR", {f"kubernetes.{D}.", "10.3.0.1"}),
        # Names without records of their own are there (RFC 8020).
        (D, "A", "NOERROR", set()),
        ("svc.cluster.local", "A", "NOERROR", set()),
        (f"_tcp.kubernetes.{D}", "SRV", "NOERROR", set()),
    ],
)  # fmt: skip
def test_the_kubernetes_dns_specification(name: str, kind: str, rcode: str, answers: set[str]) -> None:
    view = View.make("net", records=[item for service in OBJECTS for item in records(service, DOMAIN)])
    for spelt in (name, name.upper()):
        wire = answer(view, dns.message.make_query(spelt, kind).to_wire(), transport=Transport.TCP).wire
        assert wire is not None
        reply = dns.message.from_wire(wire)
        assert dns.rcode.to_text(reply.rcode()) == rcode
        assert {item.to_text() for rrset in reply.answer for item in rrset} == answers
        assert bool(reply.authority) != bool(answers)
        assert all(5 <= rrset.ttl <= 30 for rrset in (*reply.answer, *reply.authority))
