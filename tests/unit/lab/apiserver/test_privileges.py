"""Rights over signers and owners."""

from typing import Any

import pytest

from vmnet.lab.apiserver.authorization import Attributes
from vmnet.lab.apiserver.privileges import check, concerned
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.status import ApiError

REGISTRY = Registry()


def info(group: str, plural: str) -> ResourceInfo:
    found = REGISTRY.lookup(group, "v1", plural)
    assert found is not None
    return found


REQUESTS = info("certificates.k8s.io", "certificatesigningrequests")
PODS = info("", "pods")
REQUEST: dict[str, Any] = {"metadata": {"name": "r"}, "spec": {"signerName": "vmnet.io/agent"}, "status": {}}


def needed(info: ResourceInfo, subresource: str, new: Any, old: Any = None) -> list[Attributes]:
    """What is asked for, where everything is refused. Raises AssertionError when the write is not."""
    found: list[Attributes] = []

    def permits(asked: Attributes) -> bool:
        found.append(asked)
        return False

    with pytest.raises(ApiError) as caught:
        check(REGISTRY, info, subresource, new, old, permits)
    assert caught.value.code == 403
    check(REGISTRY, info, subresource, new, old, lambda _: True)
    return found


def test_approving_and_signing_are_rights_over_the_signer() -> None:
    group = "certificates.k8s.io"
    assert needed(REQUESTS, "approval", REQUEST, REQUEST) == [
        Attributes("approve", group, "signers", name="vmnet.io/agent"),
        Attributes("approve", group, "signers", name="vmnet.io/*"),
    ]
    signed = {**REQUEST, "status": {"certificate": "…"}}
    assert needed(REQUESTS, "status", signed, REQUEST)[0] == Attributes("sign", group, "signers", name="vmnet.io/agent")
    check(REGISTRY, REQUESTS, "status", signed, signed, lambda _: False)


def test_an_owner_that_must_wait_for_what_it_owns() -> None:
    owner = {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "1", "blockOwnerDeletion": True}
    pod = {"metadata": {"name": "p", "namespace": "a", "ownerReferences": [owner]}}
    assert needed(PODS, "", pod) == [Attributes("update", "", "nodes", "finalizers", "", "n1")]
    check(REGISTRY, PODS, "", pod, pod, lambda _: False)
    free = {"metadata": {**pod["metadata"], "ownerReferences": [{**owner, "blockOwnerDeletion": False}]}}
    check(REGISTRY, PODS, "", free, None, lambda _: False)


@pytest.mark.parametrize(
    ("info", "subresource", "body", "wanted"),
    [
        (REQUESTS, "approval", b"{}", True),
        (REQUESTS, "", b"{}", False),
        (PODS, "", b'{"blockOwnerDeletion":true}', True),
        (PODS, "status", b"{}", False),
    ],
)
def test_few_writes_are_concerned(info: ResourceInfo, subresource: str, body: bytes, wanted: bool) -> None:
    assert concerned(info, subresource, body) == wanted
