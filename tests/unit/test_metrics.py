"""What ``/metrics`` tells of the process itself."""

from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from vmnet import metrics
from vmnet.lab import references


async def test_readiness_is_a_metric_too() -> None:
    reason: str | None = "caches are not there"
    async with TestClient(TestServer(metrics.application(lambda: reason))) as client:
        assert (await client.get("/readyz")).status == 503
        assert await _sample(client, "vmnet_ready") == 0
        reason = None
        assert (await client.get("/readyz")).status == 200
        assert await _sample(client, "vmnet_ready") == 1


async def test_every_series_has_the_prefix_and_a_help_text() -> None:
    async with TestClient(TestServer(metrics.application(lambda: None))) as client:
        text = await (await client.get("/metrics")).text()
    known = references.samples()
    for family in text_string_to_metric_families(text):
        assert family.name.startswith(("vmnet_", "process_"))
        assert family.documentation
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                assert sample.labels.keys() == known[sample.name], sample.name


async def _sample(client: TestClient[object, object], name: str) -> float:
    text = await (await client.get("/metrics")).text()
    (found,) = [item.value for family in text_string_to_metric_families(text) for item in family.samples if item.name == name]  # fmt: skip  # noqa: E501
    return found
