"""Objects, versions, history and watchers in memory."""

import pytest

from vmnet.lab.apiserver.storage import Change, ChangeType, Expired, Store

CONFIG_MAPS = ("", "configmaps")


def config_map(name: str, value: str = "1") -> dict[str, object]:
    return {
        "kind": "ConfigMap",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "a", "uid": name},
        "data": {"k": value},
    }


def test_versions_grow_over_all_resources() -> None:
    store = Store()
    first = store.put(CONFIG_MAPS, config_map("one"))
    other = store.put(("", "secrets"), config_map("two"))
    assert other.version == first.version + 1
    assert other.obj["metadata"]["resourceVersion"] == str(other.version)


def test_a_past_state_can_be_seen_until_it_is_forgotten() -> None:
    store = Store(history=4)
    store.put(CONFIG_MAPS, config_map("one"))
    before = store.put(CONFIG_MAPS, config_map("one", "2")).version
    store.put(CONFIG_MAPS, config_map("two"))
    store.remove(CONFIG_MAPS, ("a", "one"))
    collection = store.collection(CONFIG_MAPS)
    assert {key[1]: item.obj["data"]["k"] for key, item in collection.at(before).items()} == {"one": "2"}
    assert [change.type for change in collection.since(before)] == [ChangeType.ADDED, ChangeType.DELETED]
    store.put(CONFIG_MAPS, config_map("three"))
    with pytest.raises(Expired):
        collection.since(before - 2)


def test_the_bytes_of_a_version_are_made_once_and_shared() -> None:
    stored = Store().put(CONFIG_MAPS, config_map("one"))
    assert stored.encode("v1") is stored.encode("v1")
    assert b'"apiVersion":"v2"' in stored.encode("v2")


def test_listeners_hear_within_the_write_and_only_until_they_end() -> None:
    store, heard = Store(), list[Change]()
    end = store.listen(CONFIG_MAPS, heard.append)
    store.put(CONFIG_MAPS, config_map("one"))
    removed = store.remove(CONFIG_MAPS, ("a", "one"))
    end()
    store.put(CONFIG_MAPS, config_map("two"))
    assert [change.type for change in heard] == [ChangeType.ADDED, ChangeType.DELETED]
    assert removed is heard[1].current
    assert heard[1].current.obj["metadata"]["resourceVersion"] == str(heard[1].version)


def test_compaction_forgets_everything_before_it() -> None:
    store = Store()
    version = store.put(CONFIG_MAPS, config_map("one")).version
    store.put(CONFIG_MAPS, config_map("one", "2"))
    store.compact()
    assert store.collection(CONFIG_MAPS).since(store.version) == []
    with pytest.raises(Expired) as caught:
        store.collection(CONFIG_MAPS).since(version)
    assert str(caught.value) == f"too old resource version: {version} ({store.version})"
