from vmnet.model import names
from vmnet.model.names import NetworkId


def test_interface_names_fit_the_kernel() -> None:
    for name in (
        names.port_interface("60e38f42-e409-46c9-94a8-a9936b47c975", "ovn-udn1"),
        names.join_interface(NetworkId(names.MAX_NETWORK_ID)),
        names.BRIDGE,
        names.VXLAN_L2,
        names.VXLAN_L3,
        names.UPLINK,
        names.PRIMARY_INTERFACE,
    ):
        assert len(name) <= 15


def test_router_macs_are_local_unicast_and_differ_from_the_gateway_prefix() -> None:
    mac = names.router_mac("n1")
    assert int(mac[:2], 16) & 0x03 == 0x02
    assert not mac.startswith("0a:58:")
    assert mac != names.router_mac("n2")


def test_claim_names_are_lower_case() -> None:
    assert names.claim_name("Blue", "happy") == "blue.happy"
