"""What any cluster has, without vmnet: services and names of the default network, exec and logs."""

import asyncio
import fcntl
import json
import os
import pty
import secrets
import signal
import struct
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio

from vmnet.lab import kubectl
from vmnet.lab.lab import Lab

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
]

AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.53"
CURL = ("curl", "-sSg", "--max-time", "5")


def objects(*items: dict[str, Any]) -> str:
    return "\n".join(json.dumps(item) for item in items)


def pod(name: str, node: str, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "agnhost",
                    "image": AGNHOST,
                    "args": ["netexec", "--http-port=8080", "--udp-port=8081"],
                    "ports": [
                        {"name": "http", "containerPort": 8080},
                        {"name": "datagram", "containerPort": 8081, "protocol": "UDP"},
                    ],
                    "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1},
                }
            ],
        },
    }


def service(name: str, **spec: Any) -> dict[str, Any]:
    ports = [
        {"name": "http", "port": 80, "targetPort": "http"},
        {"name": "datagram", "port": 81, "targetPort": "datagram", "protocol": "UDP"},
    ]
    body = {"selector": {"app": "web"}, "ipFamilyPolicy": "PreferDualStack", "ports": ports, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab() -> AsyncIterator[Lab]:
    """Two nodes; ``web-1`` on n1 and ``web-2`` on n2 serve, ``client`` on n1 asks."""
    async with Lab(f"s-{secrets.token_hex(4)}", 2, without=("agent", "controller", "virt")) as up:
        wanted = objects(
            pod("web-1", "n1", app="web"),
            pod("web-2", "n2", app="web"),
            pod("client", "n1"),
            service("web", type="LoadBalancer"),
            service("here", type="LoadBalancer", externalTrafficPolicy="Local", internalTrafficPolicy="Local"),
            service("none", selector={"app": "nobody"}),
            service("each", clusterIP="None"),
        )
        await up.kubectl("apply", "-f", "-", stdin=wanted)
        await up.kubectl("wait", "--for=condition=Ready", "--timeout=90s", "pod/web-1", "pod/web-2", "pod/client")
        yield up


async def spec(lab: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await lab.kubectl("get", "service", name, "-o", "json"))
    return found


async def until(look: Callable[[], Awaitable[object]], what: str, seconds: float = 60) -> Any:
    last: object = None
    try:
        async with asyncio.timeout(seconds):
            while not (last := await look()):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"{what}: {last!r}") from None
    return last


async def fetch(lab: Lab, where: str, url: str) -> str:
    """What a host of the lab, or the pod ``client``, gets; the error when it gets nothing."""
    if where == "client":
        done = await lab.exec("fabric", ["kubectl", "exec", "client", "--", *CURL, url])
    else:
        done = await lab.exec(where, [*CURL, url])
    return done.stdout if done.exit == 0 else f"failed: {done.stderr.strip()}"


async def names_of(lab: Lab, where: str, url: str, expected: set[str]) -> None:
    """Both backends are reached, and nobody else."""
    seen: set[str] = set()

    async def all_seen() -> bool:
        seen.add(await fetch(lab, where, url))
        return seen >= expected or bool(seen - expected)

    await until(all_seen, f"{where} → {url}")
    assert seen == expected, f"{where} → {url}"


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


async def test_a_cluster_address_is_served_to_pods_and_nodes_in_both_families(lab: Lab) -> None:
    for address in (await spec(lab, "web"))["spec"]["clusterIPs"]:
        for where in ("client", "n1", "n2"):
            await names_of(lab, where, f"http://{bracketed(address)}/hostname", {"web-1", "web-2"})
        client = await fetch(lab, "client", f"http://{bracketed(address)}/clientip")
        assert "10.244.1." in client or "fd00:10:244:1:" in client, "pods keep their address"


async def test_node_ports_and_load_balancer_addresses_are_served_to_the_outside(lab: Lab) -> None:
    web = await spec(lab, "web")
    number = web["spec"]["ports"][0]["nodePort"]
    for address in ("172.30.0.11", "172.30.0.12", "fd00:30::11", "fd00:30::12"):
        await names_of(lab, "outside", f"http://{bracketed(address)}:{number}/hostname", {"web-1", "web-2"})
    ingress = [item["ip"] for item in web["status"]["loadBalancer"]["ingress"]]
    assert [":" in address for address in ingress] == [False, True]
    for address in ingress:
        for where in ("outside", "n1", "client"):
            await names_of(lab, where, f"http://{bracketed(address)}/hostname", {"web-1", "web-2"})


async def test_policy_local_keeps_the_clients_address_and_the_node(lab: Lab) -> None:
    here = await spec(lab, "here")
    number = here["spec"]["ports"][0]["nodePort"]
    for node, name in (("172.30.0.11", "web-1"), ("172.30.0.12", "web-2")):
        assert await fetch(lab, "outside", f"http://{node}:{number}/hostname") == name
        assert (await fetch(lab, "outside", f"http://{node}:{number}/clientip")).startswith("172.30.0.100:")
    address = here["status"]["loadBalancer"]["ingress"][0]["ip"]
    assert (await fetch(lab, "outside", f"http://{address}/clientip")).startswith("172.30.0.100:")
    for where, name in (("client", "web-1"), ("n1", "web-1"), ("n2", "web-2")):
        assert await fetch(lab, where, f"http://{here['spec']['clusterIP']}/hostname") == name


async def test_datagrams_and_hairpins(lab: Lab) -> None:
    ask = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)\n"
        "s.sendto(b'hostname', (sys.argv[1], int(sys.argv[2]))); print(s.recvfrom(99)[0].decode())"
    )
    web = await spec(lab, "web")
    done = await lab.exec("outside", ["python3", "-c", ask, "172.30.0.11", str(web["spec"]["ports"][1]["nodePort"])])
    assert done.stdout.strip() in ("web-1", "web-2"), done.stderr
    # Each pod calls the service until it has answered itself.
    url = f"http://{web['spec']['clusterIP']}/hostname"
    for name in ("web-1", "web-2"):

        async def itself(name: str = name) -> bool:
            return (await lab.kubectl("exec", name, "--", *CURL, url)) == name

        await until(itself, f"{name} reaches itself")


async def test_without_endpoints_clients_are_refused_at_once(lab: Lab) -> None:
    none = await spec(lab, "none")
    for address in none["spec"]["clusterIPs"]:
        for where in ("client", "n1"):
            answer = await fetch(lab, where, f"http://{bracketed(address)}/hostname")
            assert "refused" in answer or "Failed to connect" in answer, answer
            assert "timed out" not in answer


async def test_endpoints_follow_readiness(lab: Lab) -> None:
    number = (await spec(lab, "here"))["spec"]["ports"][0]["nodePort"]
    await lab.kubectl("label", "pod", "web-2", "app-")
    try:

        async def dropped() -> bool:
            return "timed out" in await fetch(lab, "outside", f"http://172.30.0.12:{number}/hostname")

        await until(dropped, "n2 has no endpoint any more")
        await names_of(lab, "client", f"http://{(await spec(lab, 'web'))['spec']['clusterIP']}/hostname", {"web-1"})
        address = (await spec(lab, "here"))["status"]["loadBalancer"]["ingress"][0]["ip"]

        async def moved() -> bool:
            return await fetch(lab, "outside", f"http://{address}/hostname") == "web-1"

        await until(moved, "the node that has an endpoint answers for the load balancer's address")
    finally:
        await lab.kubectl("label", "pod", "web-2", "app=web")


async def test_the_api_server_and_the_cluster_dns_are_services(lab: Lab) -> None:
    for where in ("client", "n2"):
        done = await fetch(lab, where, "http://10.96.0.1:443/")
        assert "HTTPS" in done or "400" in done or "Empty reply" in done, done
    resolver = await lab.kubectl("exec", "client", "--", "cat", "/etc/resolv.conf")
    assert resolver == (
        "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    )
    assert await fetch(lab, "client", "http://web/hostname") in ("web-1", "web-2")
    assert "client" in await fetch(lab, "client", "http://www.outside.test/")
    each = await lab.kubectl("exec", "client", "--", "dig", "+short", "each.default.svc.cluster.local", "A")
    addresses = await lab.kubectl("get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIP}")
    assert sorted(each.split()) == sorted(addresses.split())
    for name, kind, expected in (
        ("kubernetes.default.svc.cluster.local", "A", "10.96.0.1"),
        ("kube-dns.kube-system.svc.cluster.local", "AAAA", "fd00:10:96::a"),
        ("_http._tcp.web.default.svc.cluster.local", "SRV", "0 100 80 web.default.svc.cluster.local."),
    ):
        for transport in ("+notcp", "+tcp"):
            found = await lab.kubectl("exec", "client", "--", "dig", "+short", transport, name, kind)
            assert found.strip() == expected


async def test_the_proxy_touches_its_own_tables_only_and_its_rules_outlive_it(lab: Lab) -> None:
    url = f"http://{(await spec(lab, 'web'))['spec']['clusterIP']}/hostname"
    await lab.exec("n1", ["nft", "add", "table", "inet", "somebody"])
    await lab.kill("proxy-n1")
    await lab.wait("proxy-n1")
    assert await fetch(lab, "client", url) in ("web-1", "web-2")
    await lab.restart("proxy-n1")
    await lab.kubectl("apply", "-f", "-", stdin=objects(service("later")))
    later = (await spec(lab, "later"))["spec"]["clusterIP"]
    await until(lambda: _succeeds(lab, f"http://{later}/hostname"), "the restarted proxy serves a new service")
    tables = (await lab.exec("n1", ["nft", "list", "tables"])).stdout.splitlines()
    assert "table inet somebody" in tables
    assert {"table ip kube-proxy", "table ip6 kube-proxy", "table inet pod-egress"} < set(tables)


async def _succeeds(lab: Lab, url: str) -> bool:
    return (await fetch(lab, "client", url)) in ("web-1", "web-2")


class Terminal:
    """``kubectl`` on a terminal of its own."""

    def __init__(self, lab: Lab) -> None:
        self._environment = {**os.environ, "KUBECONFIG": str(lab.kubeconfig)}
        self._seen = b""

    async def start(self, *words: str) -> None:
        self._master, slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.resize(40, 132)
        self.process = await asyncio.create_subprocess_exec(
            # Whoever was started by nohup does not know when its terminal is gone.
            *("env", "--default-signal=HUP", "setsid", "--ctty", "--wait", str(kubectl.find()), *words),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=self._environment,
        )
        os.close(slave)

    def resize(self, rows: int, columns: int) -> None:
        """The kernel tells the terminal's foreground processes by SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def until(self, text: str, seconds: float = 60) -> str:
        """Everything shown since the last call, once it contains ``text``."""

        async def shown() -> str:
            with suppress(OSError):  # nothing yet, or (EIO) kubectl has ended
                self._seen += os.read(self._master, 65536)
            return self._seen.decode(errors="replace") if text.encode() in self._seen else ""

        try:
            return str(await until(shown, f"the terminal shows {text!r}", seconds))
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._seen!r}") from None
        finally:
            self._seen = b""

    async def end(self) -> int:
        async with asyncio.timeout(60):
            status = await self.process.wait()
        os.close(self._master)
        return status


async def test_exec_on_a_terminal_is_a_session_with_a_size_and_an_exit_code(lab: Lab) -> None:
    terminal = Terminal(lab)
    await terminal.start("exec", "-it", "client", "--", "sh")
    await terminal.until("# ")
    terminal.type("echo size $(stty size); tty\n")
    assert "size 40 132" in await terminal.until("/dev/pts/")
    terminal.resize(50, 100)

    async def resized() -> bool:
        terminal.type("echo size $(stty size) END\n")
        return "size 50 100" in await terminal.until(" END\r\n")

    await until(resized, "the pod's terminal has the new size")
    # Job control: Ctrl-C ends the foreground job and not the shell.
    terminal.type("sleep 1000; echo after\n")
    terminal.type(chr(3))
    await terminal.until("# ")
    terminal.type("hostname; exit 3\n")
    assert "client" in await terminal.until("command terminated with exit code 3")
    assert await terminal.end() == 3


async def test_exec_on_a_terminal_ends_in_the_pod_when_the_client_goes(lab: Lab) -> None:
    terminal = Terminal(lab)
    await terminal.start("exec", "-it", "client", "--", "sh", "-c", "echo begun; exec sleep 4711")
    await terminal.until("begun")
    count = ("exec", "client", "--", "sh", "-c", "pgrep -fx 'sleep 4711' | wc -l")
    assert (await lab.kubectl(*count)).strip() == "1"
    terminal.process.send_signal(signal.SIGKILL)
    await terminal.end()
    # ``setsid --wait`` is what was killed: kubectl follows when its terminal is gone.

    async def ended() -> bool:
        return (await lab.kubectl(*count)).strip() == "0"

    await until(ended, "the process in the pod has ended")


async def test_exec_without_a_terminal_keeps_streams_apart_and_whole(lab: Lab) -> None:
    async def execute(*words: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        process = await asyncio.create_subprocess_exec(
            *(str(kubectl.find()), "exec", *(("-i",) if stdin else ()), "client", "--", *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "KUBECONFIG": str(lab.kubeconfig)},
        )
        output, errors = await asyncio.wait_for(process.communicate(stdin), 60)
        return process.returncode or 0, output, errors

    status, output, errors = await execute("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (status, output) == (7, b"out\n")
    assert errors.splitlines()[0] == b"err"
    data = os.urandom(3_000_000)
    assert await execute("cat", stdin=data) == (0, data, b"")
    assert (await execute("no-such-program"))[0] == 127
    assert (await execute("ping", "-c", "1", "-W", "5", "172.30.0.100"))[0] == 0


async def test_logs_can_be_followed_to_the_end(lab: Lab) -> None:
    await lab.kubectl(
        *("run", "counts", "--image=busybox", "--restart=Never", "--command", "--"),
        *("sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.5; done"),
    )
    await lab.kubectl("wait", "--for=jsonpath={.status.containerStatuses}", "pod/counts", "--timeout=60s")
    await until(lambda: _started(lab, "counts"), "the container runs")
    assert await lab.kubectl("logs", "-f", "counts") == "1\n2\n3\n"
    assert await lab.kubectl("logs", "--tail=1", "counts") == "3\n"
    assert "Started HTTP server on port 8080" in await lab.kubectl("logs", "web-1")


async def _started(lab: Lab, name: str) -> bool:
    state = await lab.kubectl("get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].state}")
    return "running" in state or "terminated" in state
