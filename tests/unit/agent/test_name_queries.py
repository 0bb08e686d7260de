"""The administrator's questions, over the real socket to real responders."""

from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from vmnet.agent.inspection import Inspection
from vmnet.agent.name_queries import NameQueries
from vmnet.agent.responder import Names, Responders
from vmnet.inspect import local
from vmnet.model.endpoint import Endpoint, PodReference
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network
from vmnet.model.service import Service


class NoSockets:
    """What is asked here needs no sockets of the network's."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    responders = Responders(NoSockets(), upstreams=dict)  # type: ignore[arg-type]
    # Without subnets there is no gateway to listen on.
    happy = Network("happy", NetworkId(7), subnets=())
    pod = Endpoint(
        PodReference("red", "web", "uid"),
        "happy",
        "n1",
        MacAddress("0a:58:0a:00:00:05"),
        (ip_interface("10.0.0.5/24"),),
    )
    alias = Service("red", "ext", (), (), alias="www.example.org")
    await responders.serve(happy, Names([pod], [Service("red", "web", (ip_address("10.96.0.7"),), ()), alias]))
    responders.deny(frozenset({ip_network("203.0.113.0/24")}))
    inspection = Inspection(tmp_path / "agent.sock", {"dns": NameQueries(responders).answer})
    await inspection.start()
    yield tmp_path / "agent.sock"
    await inspection.close()
    await responders.close()


async def ask(path: Path, network: str, name: str, kind: str) -> dict[str, Any]:
    return await local.ask(path, "dns", {"network": network, "name": name, "type": kind})


@pytest.mark.parametrize(
    ("name", "kind", "outcome", "rcode", "data", "zone"),
    [
        ("web.red.svc.cluster.local", "A", "local", "NOERROR", ["10.96.0.7"], "cluster.local."),
        ("Web.Red.svc.cluster.local.", "a", "local", "NOERROR", ["10.96.0.7"], "cluster.local."),
        ("10-0-0-5.red.pod.cluster.local", "A", "local", "NOERROR", ["10.0.0.5"], "cluster.local."),
        ("5.0.0.10.in-addr.arpa", "PTR", "local", "NOERROR", ["10-0-0-5.red.pod.cluster.local."], "10.in-addr.arpa."),
        ("blue.blue.svc.cluster.local", "A", "local", "NXDOMAIN", [], "cluster.local."),
        ("5.113.0.203.in-addr.arpa", "PTR", "local", "NXDOMAIN", [], "113.0.203.in-addr.arpa."),
        ("ext.red.svc.cluster.local", "A", "failed", "SERVFAIL", [], None),
        ("www.example.org", "A", "failed", "SERVFAIL", [], None),
    ],
)
async def test_why_an_answer_is_what_it_is(
    path: Path, name: str, kind: str, outcome: str, rcode: str, data: list[str], zone: str | None
) -> None:
    found = await ask(path, "happy", name, kind)
    assert (found["outcome"], found["rcode"], found["zone"]) == (outcome, rcode, zone)
    assert [item["data"] for item in found["answers"]] == data


async def test_bad_questions_are_told_so(path: Path) -> None:
    assert "not on this node (here: happy)" in (await ask(path, "other", "web", "A"))["error"]
    assert "bad question" in (await ask(path, "happy", "web", "NONSENSE"))["error"]
    assert "bad question" in (await ask(path, "happy", "x" * 64, "A"))["error"]
