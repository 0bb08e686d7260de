from ipaddress import ip_address, ip_interface

import pytest

from vmnet.model.addresses import interface, link_local, mac_for, parse_mac


def test_mac_follows_the_contract() -> None:
    assert mac_for(ip_address("192.168.0.5")) == "0a:58:c0:a8:00:05"
    assert mac_for(ip_address("fd00::5")).startswith("0a:58:")


def test_link_local_is_eui64() -> None:
    assert str(link_local(parse_mac("0A-58-C0-A8-00-05"))) == "fe80::858:c0ff:fea8:5"


@pytest.mark.parametrize("text", ["", "0a:58", "zz:00:00:00:00:00", "0a:58:00:00:00:00:00"])
def test_bad_macs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a MAC"):
        parse_mac(text)


@pytest.mark.parametrize("text", ["10.0.0.5/24", "10.0.0.5", "fd00::5/64", "fd00:10::a:5/128", "::ffff:10.0.0.1/96"])
def test_interfaces_are_read_as_the_standard_library_reads_them(text: str) -> None:
    assert interface(text) == ip_interface(text)


@pytest.mark.parametrize(
    "text", ["10.0.0/24", "10.0.0.05/24", "10.0.0.5/33", "fd00::5/129", "fd00:/64", "a/24", "/24", "10.0.0.5\0/24"]
)
def test_bad_interfaces_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        interface(text)
