"""What the roles and policies of ``deploy/`` allow and refuse: of agents, of tenants, of pods in our own namespace."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from vmnet.kube.api import (
    CERTIFICATE_REQUESTS,
    EVENTS,
    NAMESPACES,
    NODES,
    PODS,
    Forbidden,
    Invalid,
    KubeError,
    Object,
    PatchType,
)
from vmnet.kube.client import KubeClient
from vmnet.lab import kubectl, manifests
from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.apiserver.testing import Kubectl, running_server
from vmnet.model import names

SYSTEM = "vmnet-system"
CONTAINER = {"name": "c", "image": "i"}


class Cluster:
    """A server with all of ``deploy/``, nodes n1 and n2 with a pod each in namespace blue, and clients."""

    def __init__(self, server: ApiServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.clients: list[KubeClient] = []
        self.kubectl = Kubectl(server, directory, str(kubectl.find()))

    async def client(self, path: Path) -> KubeClient:
        made = await KubeClient.connect(path, user_agent="test")
        self.clients.append(made)
        return made

    async def admin(self) -> KubeClient:
        return await self.client(self.server.kubeconfig(self.directory / "admin"))

    async def account(self, name: str, node: str = "") -> KubeClient:
        path = self.directory / f"{name}-{node}"
        return await self.client(self.server.account_kubeconfig(path, SYSTEM, name, node))

    async def fill(self) -> None:
        await self.kubectl.check("apply", "--server-side", "--validate=strict", "-f", str(manifests.INSTALL))
        kube = await self.admin()
        await kube.create(NAMESPACES, {"metadata": {"name": "blue", "labels": {names.PRIMARY_NETWORK_LABEL: ""}}})
        for node in ("n1", "n2"):
            await kube.create(NODES, {"metadata": {"name": node}})
            await kube.create(PODS, pod(f"on-{node}", nodeName=node), "blue")


def pod(name: str, *, annotations: dict[str, str] | None = None, **spec: Any) -> Object:
    metadata = {"name": name, "labels": {"app": "x"}, "annotations": {"theirs": "1", **(annotations or {})}}
    return {"metadata": metadata, "spec": {"containers": [CONTAINER], **spec}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("rights")
    async with running_server(directory) as server:
        made = Cluster(server, directory)
        try:
            await made.fill()
            yield made
        finally:
            await asyncio.gather(*(client.close() for client in made.clients))


pytestmark = pytest.mark.asyncio(loop_scope="module")


def annotated(**annotations: str | None) -> Object:
    return {"metadata": {"annotations": annotations}}


OWN = annotated(**{names.NETWORK_STATUS_ANNOTATION: "[]", names.POD_NETWORKS_ANNOTATION: "{}"})


async def refusal(doing: Any) -> str:
    """The message of a write that is refused."""
    with pytest.raises(Forbidden) as caught:
        await doing
    return str(caught.value)


async def test_an_agent_annotates_pods_of_its_own_node(cluster: Cluster) -> None:
    agent = await cluster.account("vmnet-agent", "n1")
    found = await agent.patch(PODS, "on-n1", OWN, "blue")
    assert found["metadata"]["annotations"][names.NETWORK_STATUS_ANNOTATION] == "[]"
    found = await agent.patch(PODS, "on-n1", annotated(**{names.CUT_OVER_ANNOTATION: "{}"}), "blue")
    assert names.CUT_OVER_ANNOTATION in found["metadata"]["annotations"]


async def test_an_agent_does_not_annotate_a_pod_of_another_node(cluster: Cluster) -> None:
    agent = await cluster.account("vmnet-agent", "n1")
    text = await refusal(agent.patch(PODS, "on-n2", OWN, "blue"))
    assert "the agent of node n1 changes pods of that node alone" in text


async def test_a_token_that_tells_no_node_changes_nothing(cluster: Cluster) -> None:
    agent = await cluster.account("vmnet-agent")
    assert "does not tell its node" in await refusal(agent.patch(PODS, "on-n1", OWN, "blue"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (annotated(theirs="2"), "these annotations alone"),
        (annotated(theirs=None), "these annotations alone"),
        (annotated(new="2"), "these annotations alone"),
        ({"metadata": {"labels": {"app": "y"}}}, "nothing of a pod but its annotations"),
        ({"metadata": {"finalizers": ["a.b/c"]}}, "nothing of a pod but its annotations"),
        ({"spec": {"containers": [{**CONTAINER, "image": "evil"}]}}, "nothing of a pod but its annotations"),
    ],
)
async def test_an_agent_changes_nothing_else_of_a_pod(cluster: Cluster, body: Object, says: str) -> None:
    agent = await cluster.account("vmnet-agent", "n1")
    assert says in await refusal(agent.patch(PODS, "on-n1", body, "blue", type=PatchType.STRATEGIC))


async def test_an_agent_has_no_other_rights_over_pods_and_none_over_secrets(cluster: Cluster) -> None:
    agent = await cluster.account("vmnet-agent", "n1")
    for doing in (
        agent.create(PODS, pod("mine", nodeName="n1"), "blue"),
        agent.delete(PODS, "on-n1", "blue"),
        agent.patch(PODS, "on-n1", {"status": {"phase": "Failed"}}, "blue", subresource="status"),
        agent.patch(NODES, "n1", annotated(a="b")),
    ):
        assert 'User "system:serviceaccount:vmnet-system:vmnet-agent" cannot' in await refusal(doing)


def event(node: str) -> Object:
    about = {"kind": "Pod", "namespace": "blue", "name": "on-n1"}
    body = {"involvedObject": about, "reason": "R", "message": "m", "type": "Normal", "reportingInstance": node}
    return {"metadata": {"generateName": "e-", "namespace": "blue"}, **body}


async def test_an_agent_reports_events_of_its_own_node(cluster: Cluster) -> None:
    agents = {node: await cluster.account("vmnet-agent", node) for node in ("n1", "n2")}
    made = await agents["n1"].create(EVENTS, event("n1"), "blue")
    assert "events of that node alone" in await refusal(agents["n1"].create(EVENTS, event("n2"), "blue"))
    name = made["metadata"]["name"]
    assert (await agents["n1"].patch(EVENTS, name, {"count": 2}, "blue"))["count"] == 2
    assert "events of that node alone" in await refusal(agents["n2"].patch(EVENTS, name, {"count": 3}, "blue"))


async def test_an_agent_asks_for_no_other_certificate(cluster: Cluster) -> None:
    agent = await cluster.account("vmnet-agent", "n1")

    def request(signer: str) -> Object:
        spec = {"signerName": signer, "usages": ["client auth"], "request": "YQ=="}
        return {"metadata": {"generateName": "r-"}, "spec": spec}

    made = await agent.create(CERTIFICATE_REQUESTS, request(names.AGENT_SIGNER))
    assert made["spec"]["extra"] == {"authentication.kubernetes.io/node-name": ["n1"]}
    assert "an agent's certificate alone" in await refusal(
        agent.create(CERTIFICATE_REQUESTS, request("kubernetes.io/kube-apiserver-client"))
    )


async def test_a_token_bound_to_a_pod_tells_its_node(cluster: Cluster) -> None:
    kube = await cluster.admin()
    agent = pod("vmnet-agent-x", nodeName="n2", serviceAccountName="vmnet-agent")
    await kube.create(PODS, agent, SYSTEM)
    bound = ("--bound-object-kind", "Pod", "--bound-object-name", "vmnet-agent-x")
    token = (await cluster.kubectl.check("create", "token", "vmnet-agent", "-n", SYSTEM, *bound)).strip()
    who = await cluster.kubectl.check("auth", "whoami", "-o", "json", "--token", token)
    extra = json.loads(who)["status"]["userInfo"]["extra"]
    assert extra["authentication.kubernetes.io/node-name"] == ["n2"]


async def test_nobody_else_writes_what_a_pod_was_given(cluster: Cluster) -> None:
    kube = await cluster.admin()
    for doing in (
        kube.create(PODS, pod("forged", annotations={names.POD_NETWORKS_ANNOTATION: "{}"}), "blue"),
        kube.patch(PODS, "on-n2", annotated(**{names.POD_NETWORKS_ANNOTATION: "{}"}), "blue"),
        kube.patch(PODS, "on-n2", annotated(**{names.CUT_OVER_ANNOTATION: "{}"}), "blue"),
    ):
        assert "only vmnet writes the annotations" in await refusal(doing)
    await kube.patch(PODS, "on-n2", annotated(more="1"), "blue")
    controller = await cluster.account("vmnet-controller")
    await controller.patch(PODS, "on-n2", annotated(**{names.POD_NETWORKS_ANNOTATION: "{}"}), "blue")
    text = await refusal(kube.patch(PODS, "on-n2", annotated(**{names.POD_NETWORKS_ANNOTATION: None}), "blue"))
    assert "only vmnet writes the annotations" in text


async def test_a_namespace_does_not_change_sides(cluster: Cluster) -> None:
    kube = await cluster.admin()
    for name, labels in (("blue", {names.PRIMARY_NETWORK_LABEL: None}), ("default", {names.PRIMARY_NETWORK_LABEL: ""})):
        with pytest.raises(Invalid, match="make a new namespace"):
            await kube.patch(NAMESPACES, name, {"metadata": {"labels": labels}})
    await kube.patch(NAMESPACES, "blue", {"metadata": {"labels": {"other": "1"}}})


GOOD = {
    "containers": [
        {**CONTAINER, "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    ],
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
}


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]},
        {"containers": [{**CONTAINER, "securityContext": {"privileged": True}}]},
        {"containers": [CONTAINER]},
        {"securityContext": {}},
        {"securityContext": {"runAsNonRoot": True}},
    ],
)
async def test_no_other_pod_of_our_namespace_has_an_agents_privileges(cluster: Cluster, change: Object) -> None:
    kube = await cluster.admin()
    assert "only agents" in await refusal(kube.create(PODS, pod("p", **{**GOOD, **change}), SYSTEM))


async def test_what_restricted_allows_is_allowed(cluster: Cluster) -> None:
    kube = await cluster.admin()
    await kube.create(PODS, pod("good", **GOOD), SYSTEM)
    deployment = next(item for item in manifests.documents(manifests.rendered()) if item["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    await kube.create(PODS, {"metadata": {"name": "controller", "labels": labels}, "spec": template["spec"]}, SYSTEM)


async def test_levels_of_pod_security_are_enforced_by_labels(cluster: Cluster) -> None:
    kube = await cluster.admin()
    for mode in ("enforce", "warn"):
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted"}
        await kube.create(NAMESPACES, {"metadata": {"name": f"they-{mode}", "labels": labels}})
    text = await refusal(kube.create(PODS, pod("bad", hostNetwork=True), "they-enforce"))
    assert (
        'pods "bad" is forbidden: violates PodSecurity "restricted:latest": host namespaces (hostNetwork=true), '
        in text
    )
    await kube.create(PODS, pod("good", **GOOD), "they-enforce")
    run = ("run", "bad", "-n", "they-warn", "--image", "i", "--restart", "Never")
    found = await cluster.kubectl(*run)
    assert found.exit == 0, found
    assert 'would violate PodSecurity "restricted:latest": allowPrivilegeEscalation != false' in found.stderr


@pytest.mark.parametrize(
    ("role", "verb", "resource", "answer"),
    [
        ("view", "list", "userdefinednetworks.k8s.ovn.org", "yes"),
        ("view", "get", "ipamclaims.k8s.cni.cncf.io", "yes"),
        ("view", "create", "userdefinednetworks.k8s.ovn.org", "no"),
        ("edit", "create", "userdefinednetworks.k8s.ovn.org", "yes"),
        ("edit", "delete", "ipamclaims.k8s.cni.cncf.io", "yes"),
        ("edit", "patch", "ipamclaims.k8s.cni.cncf.io/status", "no"),
        ("admin", "update", "userdefinednetworks.k8s.ovn.org", "yes"),
        ("admin", "create", "clusteruserdefinednetworks.k8s.ovn.org", "no"),
        ("edit", "create", "network-attachment-definitions.k8s.cni.cncf.io", "no"),
    ],
)
async def test_tenants_rights(cluster: Cluster, role: str, verb: str, resource: str, answer: str) -> None:
    user = f"{role}-of-blue"
    words = ("create", "rolebinding", user, "--clusterrole", role, "--user", user, "-n", "blue")
    await cluster.kubectl(*words)
    plural, _, subresource = resource.partition("/")
    asked = ("auth", "can-i", verb, plural, "-n", "blue", "--as", user)
    found = await cluster.kubectl(*asked, *(("--subresource", subresource) if subresource else ()))
    assert found.stdout.strip() == answer, found


async def test_an_agent_speaks_for_nobody_else(cluster: Cluster) -> None:
    path = cluster.server.account_kubeconfig(cluster.directory / "speaks", SYSTEM, "vmnet-agent", "n1")
    found = await cluster.kubectl("get", "pods", "-n", "blue", "--as", "bob", "--kubeconfig", str(path))
    assert found.exit != 0
    # The real server's words (1.36).
    assert (
        'User "system:serviceaccount:vmnet-system:vmnet-agent" cannot impersonate-on:user-info:list resource "pods" in '
        'API group "" in the namespace "blue"'
    ) in found.stderr


async def test_an_account_without_a_role_lists_nothing(cluster: Cluster) -> None:
    path = cluster.server.account_kubeconfig(cluster.directory / "robot", "blue", "robot")
    robot = await cluster.client(path)
    with pytest.raises(KubeError, match="cannot list resource"):
        await robot.list(PODS, "blue")
