"""DHCPv6 messages: against scapy, both directions, and against anything a guest may send."""

from ipaddress import IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Advertise,
    DHCP6_RelayForward,
    DHCP6_Request,
    DHCP6OptClientFQDN,
    DHCP6OptClientId,
    DHCP6OptDNSDomains,
    DHCP6OptDNSServers,
    DHCP6OptIA_NA,
    DHCP6OptIAAddress,
    DHCP6OptOptReq,
    DHCP6OptPref,
    DHCP6OptRapidCommit,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
)

from vmnet.wire import dhcp6
from vmnet.wire.dhcp6 import Assigned, Association, Fqdn, Message, MessageType, Option, Status, StatusCode
from vmnet.wire.malformed import Malformed

ADDRESS = IPv6Address("fd00:7::5")
DUID = bytes(DUID_LL(lladdr="0a:58:c0:a8:00:05"))


def test_what_scapy_builds_is_read() -> None:
    data = bytes(
        DHCP6_Request(trid=0x010203)
        / DHCP6OptClientId(duid=DUID_LL(lladdr="0a:58:c0:a8:00:05"))
        / DHCP6OptServerId(duid=DUID_LL(lladdr="0a:58:c0:a8:00:01"))
        / DHCP6OptIA_NA(iaid=7, T1=1, T2=2, ianaopts=[DHCP6OptIAAddress(addr=str(ADDRESS), preflft=3, validlft=4)])
        / DHCP6OptRapidCommit()
        / DHCP6OptOptReq(reqopts=[23, 24])
        / DHCP6OptClientFQDN(fqdn="blue.example.org.", flags=1)
    )
    assert dhcp6.decode(data) == Message(
        MessageType.REQUEST,
        0x010203,
        client=DUID,
        server=bytes(DUID_LL(lladdr="0a:58:c0:a8:00:01")),
        associations=(Association(Option.IA_NA, 7, 1, 2, (Assigned(ADDRESS, 3, 4),)),),
        rapid_commit=True,
        requested=(23, 24),
        fqdn=Fqdn("blue.example.org", server_updates=True),
    )


FULL = Message(
    MessageType.ADVERTISE,
    0xABCDEF,
    client=DUID,
    server=b"\x00\x04" + bytes(16),
    associations=(
        Association(Option.IA_NA, 7, 10, 20, (Assigned(ADDRESS, 30, 40),)),
        Association(Option.IA_TA, 8, status=Status(StatusCode.NO_ADDRESSES, "none")),
        Association(Option.IA_PD, 9, status=Status(StatusCode.NO_PREFIX)),
    ),
    rapid_commit=True,
    requested=(23, 24, 39),
    preference=255,
    status=Status(StatusCode.SUCCESS, "fine"),
    dns=(IPv6Address("fd00:7::1"),),
    search=("blue.vm.cluster.local", "cluster.local"),
    fqdn=Fqdn("blue.blue.vm.cluster.local", server_updates=True, override=True),
)


def test_scapy_reads_what_is_meant() -> None:
    data = dhcp6.encode(FULL)
    assert dhcp6.decode(data) == FULL
    seen = DHCP6_Advertise(data)
    assert seen.trid == 0xABCDEF
    assert bytes(seen[DHCP6OptClientId].duid) == DUID
    association = seen[DHCP6OptIA_NA]
    assert (association.iaid, association.T1, association.T2) == (7, 10, 20)
    assert (association.ianaopts[0].addr, association.ianaopts[0].preflft, association.ianaopts[0].validlft) == (
        str(ADDRESS),
        30,
        40,
    )
    assert seen[DHCP6OptPref].prefval == 255
    assert seen[DHCP6OptDNSServers].dnsservers == ["fd00:7::1"]
    assert [name.rstrip(".") for name in seen[DHCP6OptDNSDomains].dnsdomains] == list(FULL.search)
    assert seen.getlayer(DHCP6OptStatusCode, statusmsg=b"fine").statuscode == StatusCode.SUCCESS
    assert seen[DHCP6OptClientFQDN].flags == 3


def test_a_partial_name_has_no_root_label() -> None:
    message = Message(MessageType.SOLICIT, 1, fqdn=Fqdn("blue"))
    data = dhcp6.encode(message)
    assert data.endswith(b"\x00\x04blue")
    assert dhcp6.decode(data) == message


@pytest.mark.parametrize("name", [b"", b"\0"], ids=["none", "root"])
def test_a_client_may_leave_the_name_to_the_server(name: bytes) -> None:
    decoded = dhcp6.decode(b"\x01\x00\x00\x01" + option(39, b"\x01" + name))
    assert decoded.fqdn == Fqdn("", server_updates=True)


def option(code: int, value: bytes) -> bytes:
    return code.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value


HEAD = b"\x01\x00\x00\x01"


@pytest.mark.parametrize(
    "data",
    [
        b"\x01\x00\x00",
        b"\x00\x00\x00\x01",
        b"\x0e\x00\x00\x01",
        bytes(DHCP6_RelayForward()),
        HEAD + b"\x00\x01",
        HEAD + b"\x00\x01\x00\x05abc",
        HEAD + option(1, b"ab"),
        HEAD + option(1, bytes(131)),
        HEAD + option(1, b"abcd") * 2,
        HEAD + option(14, b"x"),
        HEAD + option(6, b"\x00\x17\x00"),
        HEAD + option(7, b""),
        HEAD + option(13, b"\x00"),
        HEAD + option(23, bytes(15)),
        HEAD + option(24, b"\x05abc"),
        HEAD + option(39, b""),
        HEAD + option(39, b"\x00\x01a\x00\x01b\x00"),
        HEAD + option(3, bytes(11)),
        HEAD + option(3, b"\x00\x00\x00\x01" + b"\x00\x00\x00\x09" + b"\x00\x00\x00\x01"),
        HEAD + option(3, bytes(12) + option(5, bytes(23))),
        HEAD + option(3, bytes(12) + option(5, bytes(16) + b"\x00\x00\x00\x02\x00\x00\x00\x01")),
        HEAD + option(3, bytes(12) + option(5, bytes(24) + b"\x00")),
        HEAD + option(4, bytes(3)),
    ],
)
def test_odd_messages_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        dhcp6.decode(data)


@settings(derandomize=True, deadline=None, max_examples=600)
@given(st.integers(0, 240), st.binary(min_size=1, max_size=8), st.integers(0, 20))
def test_nothing_else_is_raised(offset: int, value: bytes, cut: int) -> None:
    good = dhcp6.encode(FULL)
    broken = good[:offset] + value + good[offset + len(value) :]
    try:
        dhcp6.decode(broken[: len(broken) - cut])
    except Malformed:
        return


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 13, 14, 23, 24, 25, 39, 77]), st.binary(max_size=40))))
def test_nothing_else_is_raised_by_odd_options(options: list[tuple[int, bytes]]) -> None:
    try:
        dhcp6.decode(HEAD + b"".join(option(code, value) for code, value in options))
    except Malformed:
        return
