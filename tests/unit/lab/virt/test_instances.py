"""Which pod the guest is in, and what the instance's status says of it."""

import json
from typing import Any

from vmnet.kube.api import Object
from vmnet.lab.virt import instances, kinds
from vmnet.model import names


def pod(uid: str, node: str = "", phase: str = "Running", job: str = "", **status: Any) -> Object:
    annotations = {kinds.JOB_NAME_ANNOTATION: job} if job else {}
    metadata = {
        "uid": uid,
        "name": uid,
        "annotations": annotations,
        "creationTimestamp": f"2026-11-23T06:49:0{uid[-1]}Z",
    }
    return {"metadata": metadata, "spec": {"nodeName": node} if node else {}, "status": {"phase": phase, **status}}


def vmi(phase: str = "Running", node: str = "") -> Object:
    return {
        "metadata": {"name": "blue"},
        "spec": {},
        "status": {"phase": phase, **({"nodeName": node} if node else {})},
    }


def test_before_there_is_a_node_a_target_is_not_the_guests() -> None:
    pods = [pod("pod-2", job="job"), pod("pod-1", "n1")]
    found = instances.current_pod(vmi(), pods)
    assert found is pods[1]


def test_the_living_before_the_completed_on_the_same_node() -> None:
    pods = [pod("pod-3", "n1", "Succeeded"), pod("pod-1", "n1"), pod("pod-2", "n2")]
    assert instances.current_pod(vmi(node="n1"), pods) is pods[1]
    assert instances.current_pod(vmi(node="n3"), pods) is None


def test_podinterface_follows_network_status() -> None:
    item = pod("pod-1")
    assert instances.primary_interface(item) == "eth0"
    status = [{"interface": "eth0"}, {"interface": "ovn-udn1", "default": True}]
    item["metadata"]["annotations"][names.NETWORK_STATUS_ANNOTATION] = json.dumps(status)
    assert instances.primary_interface(item) == "ovn-udn1"
    item["metadata"]["annotations"][names.NETWORK_STATUS_ANNOTATION] = "{"
    assert instances.primary_interface(item) == "eth0"


def test_ready_follows_the_pod() -> None:
    ready = {"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady", "lastTransitionTime": "t"}
    item = pod("pod-1", "n1", conditions=[ready])
    assert instances.ready_condition(vmi(), item)["reason"] == "ReadinessGatesNotReady"
    assert instances.ready_condition(vmi("Scheduled"), item)["reason"] == "GuestNotRunning"
    item["metadata"]["deletionTimestamp"] = "t"
    assert instances.ready_condition(vmi(), item)["reason"] == "PodTerminating"


def test_completed_pods_stay_active_pods() -> None:
    pods = [pod("pod-1", "n1", "Succeeded"), pod("pod-2", "n2"), pod("pod-3")]
    assert instances.active_pods(vmi(), pods) == {"pod-1": "n1", "pod-2": "n2", "pod-3": ""}
