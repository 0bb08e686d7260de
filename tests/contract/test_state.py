"""State that one version leaves and another finds, while they run side by side and after a rollback.

``tests/data/state/<version>.json`` is what that version wrote, and stays. Today's readers read all of them, and take
fields that a later version may add for none of their business. What today's writers write is recorded too: a change of
form is a new file beside the old ones, and readers of both.
"""

import ipaddress
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vmnet.agent import facts
from vmnet.cni import call
from vmnet.controller import migrations, objects, pods
from vmnet.ipam.network_pools import Allocation
from vmnet.model import names, network, parts
from vmnet.model.connection import TCP, Connection, Flow, TcpState
from vmnet.model.endpoint import MachineReference
from vmnet.model.migration import Carried, CutOver, Key, Way
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.wire import handover

DATA = Path(__file__).parents[1] / "data" / "state"
CURRENT = "0.1.1"
LATER: dict[str, Any] = {"addedLater": {"by": ["somebody", 1]}}

NETWORKS = {
    "layer2": Network(
        "cluster_udn_tenant",
        NetworkId(7),
        Topology.LAYER2,
        Role.PRIMARY,
        subnets=(ipaddress.ip_network("192.168.0.0/16"), ipaddress.ip_network("fd20::/64")),
        mtu=1400,
        persistent=True,
    ),
    "layer3": Network(
        "blue_net",
        NetworkId(8),
        Topology.LAYER3,
        Role.PRIMARY,
        subnets=(ipaddress.ip_network("103.103.0.0/16"),),
        host_prefixes=(24,),
    ),
    "localnet": Network("blue_lan", NetworkId(9), Topology.LOCALNET, Role.SECONDARY, physical="physnet", vlan=7),
}
PARTS = {"blue_net": (ipaddress.ip_network("103.103.1.0/24"), ipaddress.ip_network("fd20:0:0:1::/64"))}
ALLOCATION = Allocation(
    (ipaddress.ip_address("192.168.0.5"), ipaddress.ip_address("fd20::5")), (16, 64), MacAddress("0a:58:c0:a8:00:05")
)
CUT_OVER = CutOver(
    MachineReference("blue", "vm"),
    "cluster_udn_tenant",
    "n2",
    Key.FRAME,
    opened_at=10.5,
    frame_at=10.5,
    annotation_at=10.75,
    first_frame_at=10.501,
    announcements=12,
    source="n1",
    carried=Carried(Way.STREAMED, 28, 0.0123),
)
CONNECTION = Connection(
    Flow(TCP, ipaddress.ip_address("192.168.0.5"), 40000, ipaddress.ip_address("10.96.0.7"), 80),
    Flow(TCP, ipaddress.ip_address("192.168.0.9"), 8080, ipaddress.ip_address("192.168.0.5"), 40000),
    0x38E,
    300,
    tcp=TcpState(3, (7, 7), (0x23, 0x23)),
    labels=bytes(16),
)
MESSAGES = (
    handover.Ask(MachineReference("blue", "vm"), "cluster_udn_tenant"),
    handover.Told((CONNECTION,)),
    handover.Told(),
    handover.Arrived(),
    handover.Done(3),
)
CALL = call.Call({"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}, b'{"cniVersion":"1.0.0"}')


def written() -> dict[str, Any]:
    """What this version writes: into annotations and NADs, onto sockets, into files of the node."""
    return {
        "networkAttachmentDefinitions": {
            name: json.loads(found.to_nad_config(f"blue/{name}")) for name, found in NETWORKS.items()
        },
        "nodeSubnets": parts.encode_parts(PARTS),
        "podNetworks": {"blue/layer2": pods.entry(NETWORKS["layer2"], ALLOCATION)},
        "cutOver": asdict(CUT_OVER),
        "handover": [line.decode() for message in MESSAGES for line in handover.encode(message)],
        "cniCall": json.loads(call.encode_call(CALL)),
    }


@pytest.fixture(params=sorted(path.stem for path in DATA.glob("*.json")))
def recorded(request: pytest.FixtureRequest) -> Any:
    return json.loads((DATA / f"{request.param}.json").read_text())


@pytest.fixture(params=["as it was written", "with what a later version adds"])
def more(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], dict[str, Any]]:
    later = LATER if request.param.startswith("with") else {}
    return lambda found: {**found, **later}


def test_what_is_written_today_is_recorded() -> None:
    kept = json.loads((DATA / f"{CURRENT}.json").read_text())
    assert json.loads(json.dumps(written())) == kept, "a new form: record it under a new version, and read both"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(recorded: Any, more: Callable[[dict[str, Any]], dict[str, Any]], name: str) -> None:
    nad = {
        "metadata": more({"annotations": {names.NETWORK_ID_ANNOTATION: str(NETWORKS[name].id), "later": "x"}}),
        "spec": {"config": json.dumps(more(recorded["networkAttachmentDefinitions"][name]))},
    }
    assert network.from_nad(nad) == NETWORKS[name]


def test_parts_of_nodes(recorded: Any) -> None:
    assert parts.parts_of({names.NODE_SUBNETS_ANNOTATION: recorded["nodeSubnets"], "later": "x"}) == PARTS


def test_addresses_of_pods(recorded: Any, more: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    entries = more({key: more(found) for key, found in recorded["podNetworks"].items()})
    annotations = {names.POD_NETWORKS_ANNOTATION: json.dumps(entries)}
    pod = {
        "metadata": {"namespace": "blue", "name": "a", "uid": "u", "annotations": annotations},
        "spec": {"nodeName": "n1"},
    }
    found = objects.allocated(pod, "blue/layer2")
    assert found == objects.Allocated(ALLOCATION.addresses, ALLOCATION.mac)
    nad = {
        "metadata": {
            "namespace": "blue",
            "name": "layer2",
            "annotations": {names.NETWORK_ID_ANNOTATION: str(NETWORKS["layer2"].id)},
        },
        "spec": {"config": json.dumps(recorded["networkAttachmentDefinitions"]["layer2"])},
    }
    attachment = facts.attachment(nad)
    assert attachment is not None
    endpoint = facts.endpoint(pod, attachment)
    assert endpoint is not None
    assert (endpoint.addresses, endpoint.mac) == (ALLOCATION.addresses, ALLOCATION.mac)


def test_cut_overs(recorded: Any, more: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    body = more({**recorded["cutOver"], "carried": more(recorded["cutOver"]["carried"])})
    pod = {"metadata": {"name": "target", "annotations": {names.CUT_OVER_ANNOTATION: json.dumps(body)}}}
    found = migrations.cut_over(pod)
    assert found is not None
    assert asdict(found) == {**asdict(CUT_OVER), "source": found.source}
    assert facts.source_node(pod, (), None) == "n1"


def test_a_way_that_only_a_later_agent_knows_does_not_hide_the_rest(recorded: Any) -> None:
    body = {**recorded["cutOver"], "carried": {"way": "teleported", "connections": 3, "seconds": None}}
    found = migrations.cut_over({"metadata": {"annotations": {names.CUT_OVER_ANNOTATION: json.dumps(body)}}})
    assert found is not None
    assert (found.key, found.opened_at, found.carried) == (Key.FRAME, 10.5, Carried())


def test_agents_of_two_versions_understand_each_other(recorded: Any) -> None:
    assert tuple(handover.decode(line.encode()) for line in recorded["handover"]) == MESSAGES


def test_a_message_of_a_later_agent_is_refused_as_a_whole() -> None:
    """A connection that is half understood must not be written: the machine's ends as with an agent that is away."""
    with pytest.raises(ValueError):
        handover.decode(b'{"told":[],"addedLater":1}')


def test_calls_of_plugins_and_what_they_left_while_no_agent_ran(
    recorded: Any, more: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    assert call.decode_call(json.dumps(more(recorded["cniCall"])).encode()) == CALL
