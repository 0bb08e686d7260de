"""Pod Security: each rule is broken by one thing, and said in the words of the real server."""

import copy
from typing import Any

import pytest

from vmnet.lab.apiserver.pod_security import BASELINE, PRIVILEGED, RESTRICTED, violations

RECORDED = {
    "spec": {"hostNetwork": True, "containers": [{"name": "c", "image": "i", "securityContext": {"privileged": True}}]}
}
GOOD: dict[str, Any] = {
    "spec": {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "v", "emptyDir": {}}],
        "containers": [
            {
                "name": "c",
                "image": "i",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
}


def test_the_real_servers_words() -> None:
    assert ", ".join(violations(RECORDED, RESTRICTED)) == (
        'host namespaces (hostNetwork=true), privileged (container "c" must not set securityContext.privileged=true), '
        'allowPrivilegeEscalation != false (container "c" must set securityContext.allowPrivilegeEscalation=false), '
        'unrestricted capabilities (container "c" must set securityContext.capabilities.drop=["ALL"]), '
        'runAsNonRoot != true (pod or container "c" must set securityContext.runAsNonRoot=true), '
        'seccompProfile (pod or container "c" must set securityContext.seccompProfile.type to "RuntimeDefault" or '
        '"Localhost")'
    )


def test_a_good_pod_may_be_everywhere() -> None:
    assert [violations(GOOD, level) for level in (PRIVILEGED, BASELINE, RESTRICTED)] == [[], [], []]


@pytest.mark.parametrize(
    ("path", "value", "level", "rule"),
    [
        (("hostPID",), True, BASELINE, "host namespaces"),
        (("hostIPC",), True, BASELINE, "host namespaces"),
        (("volumes",), [{"name": "v", "hostPath": {"path": "/"}}], BASELINE, "hostPath volumes"),
        (("volumes",), [{"name": "v", "nfs": {}}], RESTRICTED, "restricted volume types"),
        (("containers", 0, "ports"), [{"containerPort": 1, "hostPort": 1}], BASELINE, "hostPort"),
        (("containers", 0, "securityContext", "privileged"), True, BASELINE, "privileged"),
        (("containers", 0, "securityContext", "procMount"), "Unmasked", BASELINE, "procMount"),
        (("containers", 0, "securityContext", "capabilities", "add"), ["NET_ADMIN"], BASELINE, "non-default"),
        (("containers", 0, "securityContext", "capabilities", "add"), ["CHOWN"], RESTRICTED, "unrestricted"),
        (("containers", 0, "securityContext", "capabilities", "drop"), [], RESTRICTED, "unrestricted"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True, RESTRICTED, "allowPrivilege"),
        (("containers", 0, "securityContext", "runAsNonRoot"), False, RESTRICTED, "runAsNonRoot"),
        (("containers", 0, "securityContext", "runAsUser"), 0, RESTRICTED, "runAsUser=0"),
        (("securityContext", "runAsUser"), 0, RESTRICTED, "runAsUser=0"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, BASELINE, "seccompProfile"),
        (("securityContext", "seccompProfile"), None, RESTRICTED, "seccompProfile"),
        (("securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}], BASELINE, "forbidden sysctls"),
    ],
)
def test_one_thing_breaks_one_rule(path: tuple[Any, ...], value: Any, level: str, rule: str) -> None:
    pod = copy.deepcopy(GOOD)
    place: Any = pod["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    found = violations(pod, RESTRICTED)
    assert any(text.startswith(rule) for text in found), found
    assert bool(violations(pod, BASELINE)) == (level == BASELINE)
    assert violations(pod, PRIVILEGED) == []
