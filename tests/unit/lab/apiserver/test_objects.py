"""Create, update, patch and delete, without HTTP."""

from datetime import UTC, datetime
from typing import Any

import pytest

from vmnet.lab.apiserver.objects import Objects
from vmnet.lab.apiserver.requests import DeleteOptions, WriteOptions
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Store

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def objects() -> Objects:
    found = Objects(Store(), Registry(), lambda _info: None, now=lambda: NOW)
    found.create(info(found, "namespaces"), "", {"metadata": {"name": "a"}}, options())
    return found


def options(**more: Any) -> WriteOptions:
    return WriteOptions(**{"manager": "test", **more})


def info(objects: Objects, plural: str, group: str = "") -> ResourceInfo:
    found = objects.registry.lookup(group, "v1", plural)
    assert found is not None
    return found


def make(objects: Objects, plural: str, name: str, group: str = "", **more: Any) -> dict[str, Any]:
    metadata = {"name": name, **more.pop("metadata", {})}
    return objects.create(info(objects, plural, group), "a", {"metadata": metadata, **more}, options())


def pod(objects: Objects, name: str, **spec: Any) -> dict[str, Any]:
    return make(objects, "pods", name, spec={"containers": [{"name": "c", "image": "i:1"}], **spec})


def test_the_server_sets_what_is_its_own(objects: Objects) -> None:
    found = make(objects, "configmaps", "x", metadata={"uid": "mine", "creationTimestamp": "2001-01-01T00:00:00Z"})
    assert found["metadata"]["uid"] != "mine"
    assert found["metadata"]["creationTimestamp"] == "2026-01-02T03:04:05Z"
    assert found["metadata"]["resourceVersion"] == str(objects.store.version)


def test_a_write_that_changes_nothing_keeps_the_version(objects: Objects) -> None:
    made = make(objects, "configmaps", "x", data={"k": "v"})
    body = {"metadata": {"name": "x"}, "data": {"k": "v"}}
    found, created = objects.update(info(objects, "configmaps"), "a", "x", body, options())
    assert not created
    assert found["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_stored_objects_are_not_changed_by_patches(objects: Objects) -> None:
    make(objects, "jobs", "j", group="batch", spec={"template": {"spec": {"containers": []}}})
    batch = info(objects, "jobs", "batch")
    before = objects.get(batch, "a", "j")
    text = repr(before.obj)
    patch = {"spec": {"template": {"spec": {"restartPolicy": "Never"}}}}
    objects.patch(batch, "a", "j", "application/merge-patch+json", patch, options())
    assert repr(before.obj) == text
    assert objects.get(batch, "a", "j").obj["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_status_is_written_through_its_subresource_only(objects: Objects) -> None:
    pod(objects, "p")
    pods = info(objects, "pods")
    status = {"status": {"phase": "Running"}}
    found, _ = objects.patch(pods, "a", "p", "application/merge-patch+json", status, options())
    assert found["status"]["phase"] == "Pending"
    spec = {"status": {"phase": "Running"}, "spec": {"nodeName": "n"}, "metadata": {"labels": {"x": "y"}}}
    found, _ = objects.patch(pods, "a", "p", "application/merge-patch+json", spec, options(), "status")
    assert found["status"]["phase"] == "Running"
    assert "nodeName" not in found["spec"]
    assert found["metadata"]["labels"] == {"x": "y"}
    assert found["metadata"]["generation"] == 1


def test_the_generation_follows_the_spec(objects: Objects) -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    make(objects, "deployments", "d", group="apps", spec=spec)
    deployments = info(objects, "deployments", "apps")
    for patch, generation in [({"metadata": {"labels": {"l": "m"}}}, 1), ({"spec": {"replicas": 3}}, 2)]:
        found, _ = objects.patch(deployments, "a", "d", "application/merge-patch+json", patch, options())
        assert found["metadata"]["generation"] == generation


def test_a_bound_pod_lingers_and_a_shorter_grace_wins(objects: Objects) -> None:
    pods = info(objects, "pods")
    pod(objects, "loose")
    assert objects.delete(pods, "a", "loose", DeleteOptions()).gone
    pod(objects, "bound", nodeName="n1")
    found = objects.delete(pods, "a", "bound", DeleteOptions())
    assert not found.gone
    assert found.obj["metadata"]["deletionTimestamp"] == "2026-01-02T03:04:35Z"
    found = objects.delete(pods, "a", "bound", DeleteOptions(grace=5))
    assert found.obj["metadata"]["deletionTimestamp"] == "2026-01-02T03:04:10Z"
    found = objects.delete(pods, "a", "bound", DeleteOptions(grace=60))
    assert found.obj["metadata"]["deletionGracePeriodSeconds"] == 5
    assert objects.delete(pods, "a", "bound", DeleteOptions(grace=0)).gone


def test_a_pod_with_a_finalizer_outlives_its_grace_period(objects: Objects) -> None:
    pods = info(objects, "pods")
    make(
        objects,
        "pods",
        "p",
        metadata={"finalizers": ["x.y/z"]},
        spec={"nodeName": "n", "containers": [{"name": "c", "image": "i"}]},
    )
    assert not objects.delete(pods, "a", "p", DeleteOptions(grace=0)).gone
    patch = {"metadata": {"finalizers": None}}
    objects.patch(pods, "a", "p", "application/merge-patch+json", patch, options())
    with pytest.raises(ApiError) as caught:
        objects.get(pods, "a", "p")
    assert caught.value.code == 404


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({"metadata": {"name": "x"}, "data": {"a": 1}}, 400, "cannot unmarshal number into Go struct field"),
        ({"metadata": {"name": "x"}, "kind": "Secret"}, 400, "cannot be handled as a ConfigMap"),
        ({"metadata": {"name": "x", "namespace": "b"}}, 400, "does not match the namespace"),
        ({"metadata": {"name": "X"}}, 422, "RFC 1123 subdomain"),
        ({"metadata": {"name": "x", "labels": {"a b": ""}}}, 422, "metadata.labels"),
        ({"metadata": {"name": "x", "finalizers": ["plain"]}}, 422, "fully qualified"),
        ({"metadata": {"name": "x"}, "data": {"a/b": ""}}, 422, "a valid config key"),
        ({"metadata": {"name": "x", "resourceVersion": "5"}}, 500, "resourceVersion should not be set"),
    ],
)
def test_wrong_bodies_are_refused(objects: Objects, body: dict[str, Any], code: int, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        objects.create(info(objects, "configmaps"), "a", body, options())
    assert caught.value.code == code
    assert text in str(caught.value)


def test_unknown_fields_are_warned_of_refused_or_ignored(objects: Objects) -> None:
    body = {"metadata": {"name": "x", "foo": 1}, "dota": {}}
    config_maps = info(objects, "configmaps")
    with pytest.raises(ApiError) as caught:
        objects.create(config_maps, "a", body, options(validation="Strict"))
    assert 'strict decoding error: unknown field "metadata.foo", unknown field "dota"' in str(caught.value)
    ignored = options(validation="Ignore", dry_run=True)
    assert "dota" not in objects.create(config_maps, "a", body, ignored)
    assert ignored.warnings == []
    warned = options()
    objects.create(config_maps, "a", body, warned)
    assert warned.warnings == ['unknown field "metadata.foo"', 'unknown field "dota"']


def test_generated_names_are_fresh(objects: Objects) -> None:
    body = {"metadata": {"generateName": "gen-"}}
    names = {objects.create(info(objects, "configmaps"), "a", body, options())["metadata"]["name"] for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("gen-") and len(name) == 9 for name in names)


def test_nothing_is_created_in_a_namespace_that_ends(objects: Objects) -> None:
    objects.delete(info(objects, "namespaces"), "", "a", DeleteOptions())
    with pytest.raises(ApiError) as caught:
        make(objects, "configmaps", "x")
    assert caught.value.code == 403
    assert caught.value.status["details"]["causes"][0]["reason"] == "NamespaceTerminating"


def test_events_are_seen_in_both_groups(objects: Objects) -> None:
    event = {
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "Pod", "namespace": "a", "name": "p"},
        "reason": "Started",
        "message": "m",
        "source": {"component": "kubelet"},
    }
    objects.create(info(objects, "events"), "a", event, options())
    stored = objects.get(info(objects, "events", "events.k8s.io"), "a", "e")
    found = stored.at("events.k8s.io/v1")
    assert found["regarding"]["name"] == "p"
    assert found["note"] == "m"
    assert found["reportingController"] == "kubelet"


def test_apply_creates_owns_and_gives_up(objects: Objects) -> None:
    config_maps = info(objects, "configmaps")
    media = "application/apply-patch+yaml"
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "1", "b": "1"}}
    found, created = objects.patch(config_maps, "a", "x", media, body, options(manager="one"))
    assert created
    assert found["metadata"]["managedFields"][0]["fieldsV1"] == {"f:data": {"f:a": {}, "f:b": {}}}
    body["data"] = {"a": "1"}
    found, created = objects.patch(config_maps, "a", "x", media, body, options(manager="one"))
    assert not created
    assert found["data"] == {"a": "1"}
    with pytest.raises(ApiError) as caught:
        objects.patch(config_maps, "a", "x", media, {**body, "data": {"a": "2"}}, options(manager="two"))
    assert caught.value.code == 409
