from pathlib import Path

import pytest

from vmnet_dns import zonefile
from vmnet_dns.message import encode_name

GOOD = """
network = "happy-tenant"
subnets = ["192.168.0.0/16"]
[[host]]
names = ["blue.ns.vm.cluster.local", "alias.ns.vm.cluster.local"]
addresses = ["192.168.0.5", "fd00::5"]
[[record]]
name = "_http._tcp.web.cluster.local"
srv = {port = 80, target = "blue.ns.vm.cluster.local"}
[[record]]
name = "www.cluster.local"
cname = "blue.ns.vm.cluster.local"
[[record]]
name = "text.cluster.local"
txt = "hello"
"""


def test_a_zone_file_becomes_a_view(tmp_path: Path) -> None:
    path = tmp_path / "zone.toml"
    path.write_text(GOOD)
    view = zonefile.load(path)
    assert (view.network, view.domain) == ("happy-tenant", "cluster.local")
    assert len(view.records) == 4 + 2 + 3
    assert set(view.nodes[encode_name("blue.ns.vm.cluster.local")].sets) == {1, 28}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = [", "zone.toml"),
        ("unknown = 1", "unknown keys: unknown"),
        ("subnets = ['10.0.0.1/8']", "host bits"),
        ("[[host]]\nnames = ['a']", "lacks 'addresses'"),
        ("[[host]]\nnames = ['a..b']\naddresses = ['10.0.0.1']", "a..b"),
        ("[[record]]\nname = 'a'", "needs srv, cname or txt"),
        ("[[record]]\nname = 'a'\nsrv = 5", "zone.toml"),
    ],
)
def test_a_wrong_zone_file_is_named_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "zone.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        zonefile.load(path)
    assert str(path) in str(caught.value)
