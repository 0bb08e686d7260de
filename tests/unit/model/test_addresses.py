from ipaddress import ip_address

import pytest

from vmnet.model.addresses import link_local, mac_for, parse_mac


def test_mac_follows_the_contract() -> None:
    assert mac_for(ip_address("192.168.0.5")) == "0a:58:c0:a8:00:05"
    assert mac_for(ip_address("fd00::5")).startswith("0a:58:")


def test_link_local_is_eui64() -> None:
    assert str(link_local(parse_mac("0A-58-C0-A8-00-05"))) == "fe80::858:c0ff:fea8:5"


@pytest.mark.parametrize("text", ["", "0a:58", "zz:00:00:00:00:00", "0a:58:00:00:00:00:00"])
def test_bad_macs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a MAC"):
        parse_mac(text)
