"""Names as a guest finds them, also while it moves, and what the administrator is told of them."""

import base64
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.demo import BLUE, NETWORK, RED
from vmnet.lab.errors import LabError
from vmnet.lab.processes import python_module
from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

NETWORK_NAME = names.cudn_network_name(NETWORK)
RED_NAME = "red.red-namespace.vm.cluster.local"
CONTROL = ("controller", "apiserver")
_RESOLVE = (
    "import socket, sys;"
    "print(*sorted({item[4][0] for item in socket.getaddrinfo(sys.argv[1], None, socket.AF_INET, socket.SOCK_DGRAM)}))"
)


async def told(world: Any, node: str, name: str, kind: str = "A") -> dict[str, Any]:
    """``vmnet dns query`` on a node."""
    argv = python_module("vmnet.cmd", "dns", "query", NETWORK_NAME, name, "-t", kind, "-o", "json")
    done = await world.lab.exec(node, argv, timeout=60)
    assert done.exit in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def test_the_administrator_is_told_what_a_network_is_answered_and_why(healthy: Any) -> None:
    world, node = healthy, await healthy.node_of(BLUE)
    vmi = await world.get("vmi", "-n", *BLUE)
    interface = next(item["name"] for item in vmi["spec"]["networks"] if "pod" in item)
    address = await world.ipv4(BLUE)
    machine = f"{BLUE[1]}.{BLUE[0]}.vm.cluster.local"
    for name in (machine, f"{interface}.{machine}"):
        found = await told(world, node, name)
        assert (found["outcome"], [item["data"] for item in found["answers"]]) == ("local", [address])
    assert (await told(world, node, f"nobody.{BLUE[0]}.vm.cluster.local"))["rcode"] == "NXDOMAIN"
    shared = await told(world, node, "kubernetes.default.svc.cluster.local")
    assert (shared["outcome"], shared["rcode"]) == ("local", "NOERROR")


async def test_lookups_of_a_machine_that_moves_do_not_fail(healthy: Any) -> None:
    world = healthy
    guest = await world.scenario.guest(*BLUE)
    source = await world.node_of(BLUE)
    # From before the move, over it, and on from the new node: the guest asks all the time.
    asking = f"while :; do probe resolve {RED_NAME} A || echo failed; done"
    job = await guest.start(["sh", "-c", asking])

    async def answers() -> list[str]:
        state = await guest.poll(job)
        assert state.running, state
        return list(state.stdout.split())

    async def answered_more_than(count: int) -> bool:
        return len(await answers()) > count

    try:
        await world.until("the guest gets answers", lambda: answered_more_than(5))
        migration = await world.migrate()
        assert await world.migration_ends(migration) == "Succeeded"
        assert await world.node_of(BLUE) != source
        # Its console went along.
        guest = await world.scenario.guest(*BLUE)
        count = len(await answers())
        await world.until("the guest gets answers where it is now", lambda: answered_more_than(count + 5))
        assert set(await answers()) == {await world.ipv4(RED)}
    finally:
        await guest.stop(job)


async def test_a_headless_service_has_the_networks_address_of_a_machine(healthy: Any) -> None:
    """Blue has no subdomain, so it is found by its dashed address."""
    world, node = healthy, await healthy.node_of(BLUE)
    address = await world.ipv4(BLUE)
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "machines", "namespace": BLUE[0]},
        "spec": {
            "clusterIP": "None",
            "selector": {"kubevirt.io": "virt-launcher"},
            "ports": [{"name": "ssh", "port": 22}],
        },
    }
    await world.apply(service)
    try:
        name = f"machines.{BLUE[0]}.svc.cluster.local"

        async def known() -> bool:
            return [item["data"] for item in (await told(world, node, name))["answers"]] == [address]

        await world.until("the Service has the network's address", known)
        port = await told(world, node, f"_ssh._tcp.{name}", "SRV")
        host = f"{address.replace('.', '-')}.{name}."
        assert [item["data"] for item in port["answers"] if item["type"] == "SRV"] == [f"0 0 22 {host}"]
    finally:
        await world.lab.kubectl("delete", "service", "-n", BLUE[0], "machines")

    async def gone() -> bool:
        return (await told(world, node, name))["rcode"] == "NXDOMAIN"

    await world.until("the name goes with the Service", gone)


async def test_names_are_answered_while_api_server_and_controller_are_away(healthy: Any) -> None:
    world, node = healthy, await healthy.node_of(BLUE)
    guest, red, blue = await world.scenario.guest(*BLUE), await world.ipv4(RED), await world.ipv4(BLUE)
    try:
        for process in CONTROL:
            await world.lab.kill(process, signal.SIGSTOP)
        with pytest.raises(LabError):
            await world.lab.kubectl("get", "namespaces", "--request-timeout=2s")
        for name, address in ((RED_NAME, red), (f"{BLUE[1]}.{BLUE[0]}.vm.cluster.local", blue)):
            result = await guest.run(["probe", "resolve", name, "A"])
            assert result.stdout.split() == [address], result
            found = await told(world, node, name)
            assert (found["outcome"], [item["data"] for item in found["answers"]]) == ("local", [address])
    finally:
        for process in reversed(CONTROL):
            await world.lab.kill(process, signal.SIGCONT)

    async def back() -> bool:
        try:
            return bool((await world.get("namespaces"))["items"])
        except LabError:
            return False

    await world.until("the API server answers", back)


@pytest.fixture(scope="module")
def musl_lookup(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program with musl's resolver in it, as base64."""
    program = tmp_path_factory.mktemp("musl") / "lookup"
    source = Path(__file__).parents[1] / "lookup.c"
    subprocess.run(["musl-gcc", "-static", "-s", "-Os", "-o", str(program), str(source)], check=True, timeout=60)
    return base64.b64encode(program.read_bytes()).decode()


async def test_c_libraries_find_machines_and_a_guest_finds_a_pods_hostname(healthy: Any, musl_lookup: str) -> None:
    """glibc and musl, by the resolv.conf that the kubelet or DHCP wrote; the pod has a hostname under a Service."""
    world, namespace = healthy, BLUE[0]
    unpack = "mkdir -p /tmp && base64 -d >/tmp/lookup && chmod +x /tmp/lookup"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": "asker", "labels": {"app": "asker"}},
        "spec": {
            "hostname": "first",
            "subdomain": "askers",
            "containers": [{"name": "main", "image": "agnhost"}],
            "terminationGracePeriodSeconds": 1,
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": "askers"},
        "spec": {"clusterIP": "None", "selector": {"app": "asker"}, "ports": [{"name": "http", "port": 80}]},
    }
    await world.apply(pod, service)
    try:
        await world.lab.kubectl("wait", "-n", namespace, "pod/asker", "--for=condition=Ready", "--timeout=90s")
        annotations = (await world.get("pod", "-n", namespace, "asker"))["metadata"]["annotations"]
        allocated = json.loads(annotations[names.POD_NETWORKS_ANNOTATION])
        own = next(text.split("/")[0] for entry in allocated.values() for text in entry["ip_addresses"] if "." in text)

        async def resolved(name: str) -> str:
            words = ("exec", "-n", namespace, "asker", "--", "python3", "-c", _RESOLVE, name)
            return str(await world.lab.kubectl(*words)).strip()

        red = await world.ipv4(RED)
        assert await resolved(RED_NAME) == red
        pod_words = ("exec", "-i", "-n", namespace, "asker", "--")
        await world.lab.kubectl(*pod_words, "sh", "-c", unpack, stdin=musl_lookup)
        asked = await world.lab.kubectl(*pod_words, "/tmp/lookup", RED_NAME, "nobody")
        assert red in asked.split()
        assert asked.split()[-1] == "none"

        # The pod itself reads its own hostname in /etc/hosts; a guest asks, in full and by its search list.
        guest = await world.scenario.guest(*RED)
        unpacked = await guest.run(["sh", "-c", unpack], input=musl_lookup, timeout=120)
        assert unpacked.exit == 0, unpacked
        # musl takes the search list only for names without a dot.
        wanted = {RED[1]: red, f"{BLUE[1]}.{BLUE[0]}.vm.cluster.local": await world.ipv4(BLUE)}
        for name, address in wanted.items():
            assert address in (await guest.run(["/tmp/lookup", name])).stdout.split(), name
        assert (await guest.run(["/tmp/lookup", "nobody"])).stdout.split() == ["none"]
        for name in (f"first.askers.{namespace}.svc.cluster.local", f"first.askers.{namespace}"):

            async def named(name: str = name) -> bool:
                return list((await guest.run(["probe", "resolve", name, "A"])).stdout.split()) == [own]

            await world.until(f"{name} is known", named)
    finally:
        await world.lab.kubectl("delete", "-n", namespace, "pod/asker", "service/askers", "--wait=false")
