"""CNI ADD, from request to reply, against the same kernel operations in a shell script.

The agent, the controller and the API server are the real ones; the pods are bound to the node and nobody runs them, so
that nothing but their attachment is measured.
"""

import asyncio
import json
import math
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import yaml

from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.model import names

WITHOUT: Final = ("virt", "proxy", "outside")
NAMESPACE: Final = "bench"
LIMIT: Final = 3.0
_SECONDS: Final = 120.0


def manifests(count: int) -> str:
    """A namespace, its network, and pods that are bound to ``n1``."""
    network = {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["10.128.0.0/16", "fd20::/64"]}}
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"pod-{number}", "namespace": NAMESPACE},
            "spec": {"nodeName": "n1", "containers": [{"name": "pause", "image": "pause"}]},
        }
        for number in range(count)
    ]
    labels = {names.PRIMARY_NETWORK_LABEL: ""}
    return str(
        yaml.safe_dump_all(
            [
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}},
                {
                    "apiVersion": "k8s.ovn.org/v1",
                    "kind": "UserDefinedNetwork",
                    "metadata": {"name": "bench", "namespace": NAMESPACE},
                    "spec": network,
                },
                *pods,
            ]
        )
    )


async def measure(count: int, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of every ADD and of every script. Raises LabError."""
    async with Lab("bench-attach", nodes=1, without=WITHOUT) as lab:
        tell(f"{count} pods bound to one node")
        await lab.kill("kubelet-n1", signal.SIGSTOP)
        await lab.kubectl("apply", "-f", "-", stdin=manifests(count))
        pods = await _annotated(lab, count)
        tell("attach them, and as many by script")
        done = await lab.exec(
            "n1", [sys.executable, "-m", "vmnet.lab.bench.attach_node"], stdin=json.dumps(pods), timeout=600
        )
        if done.exit:
            raise LabError(f"attachments: {done.stderr.strip()[-800:]}")
        found: dict[str, list[float]] = json.loads(done.stdout)
        return found


async def _annotated(lab: Lab, count: int) -> list[list[str]]:
    """The pods, once the controller has given all of them addresses."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _SECONDS
    while True:
        listed: list[dict[str, Any]] = json.loads(await lab.kubectl("get", "pods", "-n", NAMESPACE, "-o", "json"))[
            "items"
        ]
        ready = [
            pod["metadata"]
            for pod in listed
            if names.POD_NETWORKS_ANNOTATION in (pod["metadata"].get("annotations") or {})
        ]
        if len(ready) == count:
            return [[item["namespace"], item["name"], item["uid"]] for item in ready]
        if loop.time() > end:
            raise LabError(f"only {len(ready)} of {count} pods have addresses after {_SECONDS:g} s")
        await asyncio.sleep(0.2)


def percentile(found: list[float], share: float) -> float:
    """The smallest value that ``share`` of them do not exceed."""
    return sorted(found)[max(0, math.ceil(len(found) * share) - 1)]
