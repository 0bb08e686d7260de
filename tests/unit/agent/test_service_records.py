import struct
from ipaddress import ip_address

from vmnet.agent.service_records import records
from vmnet.model.service import Backend, Member, Service, ServicePort
from vmnet_dns.message import Type, encode_name, reverse_name

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
