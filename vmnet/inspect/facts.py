"""What is known of a cluster at one moment: its objects, as the API has them, and what each agent says of its node."""

import asyncio
import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509

from vmnet.inspect.connection import Connection
from vmnet.inspect.errors import NodeUnreadable
from vmnet.inspect.nodes import CONTROLLER_LABEL, AgentPod, Nodes
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    LEASES,
    MUTATING_WEBHOOKS,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    SECRETS,
    UDNS,
    VALIDATING_WEBHOOKS,
    VMIMS,
    VMIS,
    Forbidden,
    Kube,
    NotFound,
    Object,
    Resource,
)

DEFINITIONS: Final = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
LISTED: Final = (NODES, NAMESPACES, PODS, NADS, UDNS, CUDNS, CLAIMS, VMIS, VMIMS)
"""Kinds that are read whole."""
LEASE: Final = "vmnet-controller"
"""Of the leading controller."""
WEBHOOKS: Final = "vmnet-pods"
"""Both webhook configurations."""
WEBHOOK_SECRET: Final = "vmnet-webhook"  # noqa: S105 - a name
STATUS_WORDS: Final = ("vmnet", "status", "--local", "-o", "json")

Report = Mapping[str, Any]
"""What an agent says of its node: ``vmnet.agent.self_report``."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that ``verdicts`` judges."""

    now: datetime
    namespace: str
    """Where vmnet's own pods are."""
    objects: Mapping[Resource, tuple[Object, ...]] = field(default_factory=dict)
    """By kind; a kind that the API does not serve is not there."""
    controllers: tuple[Object, ...] = ()
    lease: Object | None = None
    definitions: Mapping[str, Object | None] = field(default_factory=dict)
    """The CustomResourceDefinitions that vmnet needs, by name; None for one that does not exist."""
    webhooks: Mapping[str, Object | None] = field(default_factory=dict)
    """Webhook configurations by kind."""
    certificate: datetime | None = None
    """Until when the webhook's certificate is valid; None where that is not known."""
    agents: Mapping[str, AgentPod] = field(default_factory=dict)
    """By node."""
    reports: Mapping[str, Report | NodeUnreadable] = field(default_factory=dict)
    """By node."""
    unreadable: tuple[str, ...] = ()
    """What could not be read, each with its reason."""

    def of(self, resource: Resource) -> tuple[Object, ...]:
        """Objects of one kind."""
        return self.objects.get(resource, ())

    def read(self) -> Iterator[tuple[str, Report]]:
        """Nodes whose agents have answered."""
        for node, report in sorted(self.reports.items()):
            if not isinstance(report, NodeUnreadable):
                yield node, report


def definition_name(resource: Resource) -> str:
    """Name of a kind's CustomResourceDefinition."""
    return f"{resource.plural}.{resource.group}"


async def collect(kube: Kube, connection: Connection) -> Facts:
    """Read them. Raises KubeError where the API cannot be asked at all; what only part of it refuses is said."""
    nodes, unreadable = Nodes(kube, connection), list[str]()
    agents = await nodes.refresh()

    async def listed(resource: Resource) -> tuple[Object, ...] | None:
        try:
            return (await kube.list(resource)).items
        except NotFound:
            return None
        except Forbidden as error:
            unreadable.append(f"{resource.plural} cannot be listed: {error}")
            return None

    async def one(resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        try:
            return await kube.get(resource, name, namespace)
        except NotFound:
            return None
        except Forbidden as error:
            unreadable.append(f"{resource.plural} {name} cannot be read: {error}")
            return None

    async with asyncio.TaskGroup() as group:
        asked = group.create_task(_reports(nodes), name="ask the agents")
        lists = {kind: group.create_task(listed(kind), name=f"list {kind.plural}") for kind in LISTED}
        found = {
            kind: group.create_task(one(DEFINITIONS, definition_name(kind)), name=f"definition of {kind.plural}")
            for kind in (UDNS, CUDNS, NADS, CLAIMS)
        }
        hooks = {
            kind: group.create_task(one(kind, WEBHOOKS), name=f"{kind.plural}")
            for kind in (MUTATING_WEBHOOKS, VALIDATING_WEBHOOKS)
        }
        lease = group.create_task(one(LEASES, LEASE, connection.namespace), name="lease")
        secret = group.create_task(one(SECRETS, WEBHOOK_SECRET, connection.namespace), name="certificate")
        controllers = group.create_task(
            kube.list(PODS, connection.namespace, labels=CONTROLLER_LABEL), name="controllers"
        )
    return Facts(
        now=datetime.now(UTC),
        namespace=connection.namespace,
        objects={kind: items for kind, task in lists.items() if (items := task.result()) is not None},
        controllers=controllers.result().items,
        lease=lease.result(),
        definitions={definition_name(kind): task.result() for kind, task in found.items()},
        webhooks={kind.kind: task.result() for kind, task in hooks.items()},
        certificate=_expiry(secret.result()),
        agents=agents,
        reports=asked.result(),
        unreadable=tuple(unreadable),
    )


async def _reports(nodes: Nodes) -> dict[str, Report | NodeUnreadable]:
    found: dict[str, Report | NodeUnreadable] = {}
    for node, answer in (await nodes.run_all(STATUS_WORDS)).items():
        if isinstance(answer, NodeUnreadable):
            found[node] = answer
            continue
        try:
            report = answer.json()
        except NodeUnreadable as error:
            found[node] = error
            continue
        found[node] = report
    return found


def _expiry(secret: Object | None) -> datetime | None:
    """Of the certificate in a Secret; nothing else of it is kept."""
    try:
        text = base64.b64decode((secret or {})["data"]["tls.crt"], validate=True)
        return x509.load_pem_x509_certificate(text).not_valid_after_utc
    except (KeyError, TypeError, binascii.Error, ValueError):
        return None
