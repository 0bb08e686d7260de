import asyncio
import base64
import json
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vmnet.controller import webhook
from vmnet.controller.certificates import SERVING_DAYS, Certificates
from vmnet.controller.webhook import Keeper, Place, Reviewer, Server, application
from vmnet.kube.api import MUTATING_WEBHOOKS, SECRETS, VALIDATING_WEBHOOKS, Object
from vmnet.model import names

KUBEVIRT = {"username": "system:serviceaccount:kubevirt:kubevirt-controller", "groups": ["system:authenticated"]}
TENANT = {"username": "alice", "groups": ["system:authenticated"]}


@pytest.fixture
def tenant(world: Any) -> Any:
    world.namespace("blue")
    world.cudn("happy-tenant", "blue")
    return world


@pytest.fixture
async def reviewer(tenant: Any) -> AsyncIterator[Reviewer]:
    async with tenant.controller() as controller:
        await tenant.until(lambda: controller.cluster.primary("blue"))
        yield Reviewer(tenant.kube, controller.cluster, "vmnet-system")


def launcher(vmi: Object, **annotations: str) -> Object:
    metadata = vmi["metadata"]
    owner = {"kind": "VirtualMachineInstance", "name": metadata["name"], "uid": metadata["uid"], "controller": True}
    labels = {"kubevirt.io": "virt-launcher", names.CREATED_BY_LABEL: metadata["uid"]}
    found = {"generateName": "virt-launcher-", "labels": labels, "ownerReferences": [owner]}
    return {"metadata": {**found, **({"annotations": annotations} if annotations else {})}, "spec": {}}


def request(pod: Object, user: Object = KUBEVIRT, old: Object | None = None) -> Object:
    operation = "CREATE" if old is None else "UPDATE"
    found = {"uid": "u", "namespace": "blue", "name": "pod", "operation": operation, "userInfo": user}
    return {**found, "object": pod, "oldObject": old}


def values(operations: list[Object]) -> dict[str, Any]:
    prefix = "/metadata/annotations/"
    return {
        item["path"].removeprefix(prefix).replace("~1", "/"): item["value"]
        for item in operations
        if item["path"].startswith(prefix)
    }


async def test_source_and_target_get_the_reference(tenant: Any, reviewer: Reviewer) -> None:
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    expected = {names.PRIMARY_CLAIM_ANNOTATION: "blue.happy"}
    source = await reviewer.mutate(request(launcher(vmi)))
    assert source[0] == {"op": "add", "path": "/metadata/annotations", "value": {}}
    assert values(source) == expected
    target = launcher(vmi, other="x")
    target["metadata"]["labels"][names.MIGRATION_JOB_LABEL] = "job"
    assert values(await reviewer.mutate(request(target))) == expected


async def test_a_request_for_addresses_is_put_on_the_pod_too(tenant: Any, reviewer: Reviewer) -> None:
    mac = "02:03:04:05:06:07"
    vmi = tenant.vmi(tenant.vm("blue", "static", mac=mac, addresses=["192.168.0.50", "fd00:10::50"]))
    found = values(await reviewer.mutate(request(launcher(vmi))))
    assert found[names.PRIMARY_CLAIM_ANNOTATION] == "static.happy"
    assert json.loads(found[names.DEFAULT_NETWORK_ANNOTATION]) == [
        {
            "name": "default",
            "namespace": "vmnet-system",
            "ips": ["192.168.0.50/16", "fd00:10::50/64"],
            "mac": mac,
            "ipam-claim-reference": "static.happy",
        }
    ]


async def test_what_ipam_extensions_has_written_stays(tenant: Any, reviewer: Reviewer) -> None:
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    assert await reviewer.mutate(request(launcher(vmi, **{names.PRIMARY_CLAIM_ANNOTATION: "blue.happy"}))) == []


async def test_pods_of_no_machine_and_of_no_network_are_left_alone(tenant: Any, reviewer: Reviewer) -> None:
    tenant.namespace("plain", labelled=False)
    vmi = tenant.vmi(tenant.vm("plain", "vm"))
    assert await reviewer.mutate({**request(launcher(vmi)), "namespace": "plain"}) == []
    pod: Object = {"metadata": {"name": "web"}, "spec": {}}
    assert await reviewer.mutate(request(pod)) == []
    stranger = launcher({"metadata": {"name": "none", "uid": "none"}})
    assert await reviewer.mutate(request(stranger)) == []


async def test_kubevirt_and_administrators_may_create_machines_pods(tenant: Any, reviewer: Reviewer) -> None:
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    pod = launcher(vmi, **{names.PRIMARY_CLAIM_ANNOTATION: "blue.happy"})
    assert await reviewer.refusal(request(pod)) is None
    assert await reviewer.refusal(request(pod, {"username": "admin", "groups": ["system:masters"]})) is None


@pytest.mark.parametrize("user", [TENANT, {"username": "system:serviceaccount:blue:default"}, {}])
async def test_nobody_else_makes_himself_the_target_of_a_machine(tenant: Any, reviewer: Reviewer, user: Object) -> None:
    victim = tenant.vmi(tenant.vm("blue", "victim"))
    found = await reviewer.refusal(request(launcher(victim), user))
    assert found == "only KubeVirt creates pods for a machine (label kubevirt.io=virt-launcher)"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (names.PRIMARY_CLAIM_ANNOTATION, "victim.happy"),
        (names.DEFAULT_NETWORK_ANNOTATION, json.dumps([{"name": "default", "ipam-claim-reference": "victim.happy"}])),
        (names.NETWORKS_ANNOTATION, json.dumps([{"name": "net", "ipam-claim-reference": "victim.happy"}])),
    ],
)
async def test_a_pod_names_the_claims_of_its_own_machine(tenant: Any, reviewer: Reviewer, key: str, value: str) -> None:
    tenant.vm("blue", "victim")
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    found = await reviewer.refusal(request(launcher(vmi, **{key: value})))
    assert found == "IPAMClaim victim.happy is not one of machine blue"
    # Also beside a true one.
    both = {names.PRIMARY_CLAIM_ANNOTATION: "blue.happy"} | {key: value}
    assert await reviewer.refusal(request(launcher(vmi, **both))) == found


async def test_a_reference_without_a_machine_is_refused(reviewer: Reviewer) -> None:
    stranger = launcher({"metadata": {"name": "gone", "uid": "gone"}}, **{names.PRIMARY_CLAIM_ANNOTATION: "gone.happy"})
    found = await reviewer.refusal(request(stranger))
    assert found == "it refers to IPAMClaim gone.happy, but belongs to no VirtualMachineInstance"


async def test_an_unreadable_request_is_refused_with_the_reason(tenant: Any, reviewer: Reviewer) -> None:
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    found = await reviewer.refusal(request(launcher(vmi, **{names.DEFAULT_NETWORK_ANNOTATION: "[{"})))
    assert found is not None
    assert "is not JSON" in found


async def test_what_binds_a_pod_does_not_change_by_other_hands(tenant: Any, reviewer: Reviewer) -> None:
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    old = launcher(vmi, **{names.PRIMARY_CLAIM_ANNOTATION: "blue.happy"})
    # The controller, Multus and everybody else write other keys.
    annotations = {**old["metadata"]["annotations"], names.POD_NETWORKS_ANNOTATION: "{}"}
    fine = {**old, "metadata": {**old["metadata"], "annotations": annotations}}
    assert await reviewer.refusal(request(fine, TENANT, old)) is None
    other = launcher(vmi, **{names.PRIMARY_CLAIM_ANNOTATION: "victim.happy"})
    assert "changes what binds a pod" in (await reviewer.refusal(request(other, TENANT, old)) or "")
    adopted = launcher({"metadata": {"name": "victim", "uid": "victim"}})
    assert await reviewer.refusal(request(adopted, TENANT, old)) is not None


class Installed:
    """The two configurations, as the manifests have them."""

    def __init__(self, world: Any) -> None:
        self.kube = world.kube
        for resource, path in ((MUTATING_WEBHOOKS, "/mutate"), (VALIDATING_WEBHOOKS, "/validate")):
            service = {"namespace": "vmnet-system", "name": "vmnet-webhook", "path": path}
            hook = {"name": "hook", "clientConfig": {"service": service}}
            self.kube.seed(resource, {"metadata": {"name": "vmnet-pods"}, "webhooks": [hook]})

    def config(self, resource: Any) -> Any:
        return self.kube.peek(resource, "vmnet-pods")["webhooks"][0]["clientConfig"]

    def certificates(self) -> Certificates:
        return Certificates.from_secret(self.kube.peek(SECRETS, "vmnet-webhook", "vmnet-system")["data"])


async def test_the_leader_makes_certificates_and_tells_the_api(world: Any) -> None:
    installed = Installed(world)
    keeper = Keeper(world.kube, Place("vmnet-system"), lambda: world.now)
    await keeper.keep()
    made = installed.certificates()
    for resource in (MUTATING_WEBHOOKS, VALIDATING_WEBHOOKS):
        config = installed.config(resource)
        assert base64.b64decode(config["caBundle"]).decode() == made.authorities
        assert config["service"]["name"] == "vmnet-webhook"
    world.kube.calls.clear()
    await keeper.keep()
    assert {verb for verb, _ in world.kube.calls} == {"get"}


async def test_certificates_are_renewed_and_a_spoiled_secret_is_made_anew(world: Any) -> None:
    installed = Installed(world)
    keeper = Keeper(world.kube, Place("vmnet-system"), lambda: world.now)
    await keeper.keep()
    first = installed.certificates()
    world.now += timedelta(days=SERVING_DAYS * 0.7)
    await keeper.keep()
    second = installed.certificates()
    assert second.certificate != first.certificate
    assert second.authorities == first.authorities
    secret = world.kube.peek(SECRETS, "vmnet-webhook", "vmnet-system")
    world.kube.seed(SECRETS, {**secret, "data": {"tls.crt": "spoiled"}})
    await keeper.keep()
    third = installed.certificates()
    config = installed.config(MUTATING_WEBHOOKS)
    assert base64.b64decode(config["caBundle"]).decode() == third.authorities


async def test_without_the_configurations_nothing_is_missed(world: Any) -> None:
    await Keeper(world.kube, Place("vmnet-system"), lambda: world.now).keep()
    assert world.kube.peek(SECRETS, "vmnet-webhook", "vmnet-system") is not None


async def test_a_replica_serves_with_the_leaders_certificate(
    tenant: Any, reviewer: Reviewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "FIRST_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(webhook, "LOOK_AGAIN_SECONDS", 0.01)
    installed = Installed(tenant)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = Place("vmnet-system", f"https://127.0.0.1:{port}")
    server = Server(tenant.kube, reviewer, place, ("127.0.0.1", port))
    serving = asyncio.create_task(server.run())
    try:
        keeper = Keeper(tenant.kube, place)
        await keeper.keep()
        await tenant.until(lambda: server.addresses)
        config = installed.config(MUTATING_WEBHOOKS)
        assert config["url"] == f"https://127.0.0.1:{port}/mutate"
        assert "service" not in config
        vmi = tenant.vmi(tenant.vm("blue", "blue"))

        async def ask() -> Any:
            bundle = base64.b64decode(installed.config(MUTATING_WEBHOOKS)["caBundle"]).decode()
            context = ssl.create_default_context(cadata=bundle)
            body = {"kind": "AdmissionReview", "request": request(launcher(vmi))}
            async with aiohttp.ClientSession() as session, session.post(config["url"], json=body, ssl=context) as found:
                return (await found.json())["response"]

        response = await ask()
        assert (response["uid"], response["allowed"], response["patchType"]) == ("u", True, "JSONPatch")
        assert names.PRIMARY_CLAIM_ANNOTATION.replace("/", "~1") in base64.b64decode(response["patch"]).decode()
        # Everything anew, while it serves: the next connection gets the new certificate.
        tenant.kube.vanish(SECRETS, "vmnet-webhook", "vmnet-system")
        await keeper.keep()
        await tenant.until(lambda: server._used == installed.certificates())
        assert (await ask())["allowed"]
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_nonsense_is_no_review(tenant: Any, reviewer: Reviewer) -> None:
    runner = web.AppRunner(application(reviewer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            for body in (b"", b"[]", b'{"request": {}}', b'{"request": {"object": null}}'):
                for path in ("/mutate", "/validate"):
                    async with session.post(url + path, data=body) as found:
                        assert found.status == 400
    finally:
        await runner.cleanup()
