"""``deploy/`` on an API server: everything is admitted under strict validation, by unmodified kubectl."""

import json
from pathlib import Path

import pytest

from vmnet.lab import kubectl, manifests
from vmnet.lab.apiserver.testing import Kubectl, running_server


@pytest.mark.parametrize("folder", [".", "overlays/kind", "overlays/with-multus"])
async def test_kustomize_applies_twice(folder: str, tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(kubectl.find()))
        apply = ("apply", "-k", str(manifests.DEPLOY / folder), "--server-side", "--validate=strict", "-o", "json")
        first = json.loads(await run.check(*apply, timeout=90))["items"]
        second = json.loads(await run.check(*apply, timeout=90))["items"]
    # The second time changes nothing. (Definitions were given a status meanwhile.)
    kept = [
        [
            (item["metadata"]["name"], item["metadata"]["resourceVersion"])
            for item in items
            if item["kind"] != "CustomResourceDefinition"
        ]
        for items in (first, second)
    ]
    assert kept[0] == kept[1]
    wanted = manifests.documents(manifests.rendered(manifests.DEPLOY / folder))
    assert {item["metadata"]["name"] for item in first} == {item["metadata"]["name"] for item in wanted}


async def test_the_single_file_applies(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(kubectl.find()))
        await run.check("apply", "--server-side", "--validate=strict", "-f", str(manifests.INSTALL), timeout=90)
        await run.check("apply", "--validate=strict", "-f", str(manifests.INSTALL), timeout=90)
        await run.check("delete", "--ignore-not-found", "--wait=false", "-f", str(manifests.INSTALL), timeout=90)
        left = await run.check("get", "clusterroles,validatingadmissionpolicies", "-o", "name")
    assert "vmnet" not in left
