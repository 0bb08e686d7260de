"""Events (core/v1) about objects: repeated ones are counted, floods are bounded."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from vmnet.kube.api import EVENTS, AlreadyExists, Kube, KubeError, NotFound, Object, PatchType
from vmnet.kube.codec import encode_time

log = logging.getLogger(__name__)

REMEMBERED: Final = 1024
"""Distinct events whose count is kept; the one not repeated for longest is forgotten first."""
BURST: Final = 25
REFILL_PER_SECOND: Final = 1 / 10
"""Per object: a burst, then one write in ten seconds. What is above is counted and told with the next write."""
_MESSAGE_LIMIT: Final = 1024


@dataclass(slots=True)
class _Repeated:
    name: str
    namespace: str
    count: int
    unsent: int = 0


@dataclass(slots=True)
class _Budget:
    tokens: float
    at: float


class Recorder:
    """Writes events. Never raises: an event is a courtesy, and losing one must not stop the work it tells of."""

    def __init__(
        self, kube: Kube, component: str, *, host: str = "", now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """``component`` and ``host``: the event's source, e.g. ``vmnet-agent`` and the node's name."""
        self._kube = kube
        self._component = component
        self._host = host
        self._now = now
        self._repeated: OrderedDict[str, _Repeated] = OrderedDict()
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    async def event(
        self,
        about: Object,
        reason: str,
        message: str,
        type: Literal["Normal", "Warning"] = "Normal",
        next_step: str = "",
    ) -> None:
        """Tell that ``reason`` happened to ``about``. The same object, reason, message and type raise the count.

        ``next_step``: what the reader can do about it; every warning has one.
        """
        metadata = about.get("metadata") or {}
        step = f" → {next_step}" if next_step else ""
        message = message[: _MESSAGE_LIMIT - len(step)] + step
        identity = "\0".join(
            str(part)
            for part in (about.get("kind"), metadata.get("namespace"), metadata.get("name"), metadata.get("uid"))
        )
        key = "\0".join((identity, type, reason, message))
        known = self._repeated.get(key)
        if not self._allowed(identity):
            if known is not None:
                known.unsent += 1
            log.info("event suppressed: %s %s: %s", metadata.get("name"), reason, message)
            return
        try:
            # Two repeats at once would both create, or both write the same count.
            async with self._lock(key):
                await self._write(key, about, reason, message, type)
        except KubeError as error:
            log.warning("event lost: %s %s: %s (%s)", metadata.get("name"), reason, message, error)
        finally:
            self._unlock(key)

    async def _write(self, key: str, about: Object, reason: str, message: str, type: str) -> None:
        now = encode_time(self._now())
        known = self._repeated.get(key)
        if known is not None:
            count = known.count + known.unsent + 1
            try:
                body = {"count": count, "lastTimestamp": now}
                await self._kube.patch(EVENTS, known.name, body, known.namespace, type=PatchType.MERGE)
            except NotFound:
                # Events live for an hour; the count starts again.
                del self._repeated[key]
            else:
                known.count, known.unsent = count, 0
                self._repeated.move_to_end(key)
                return
        made = self._body(key, about, reason, message, type, now)
        metadata = made["metadata"]
        try:
            await self._kube.create(EVENTS, made, metadata["namespace"])
        except AlreadyExists:
            log.debug("event %s is there already", metadata["name"])
        self._repeated[key] = _Repeated(metadata["name"], metadata["namespace"], 1)
        while len(self._repeated) > REMEMBERED:
            self._repeated.popitem(last=False)

    def _body(self, key: str, about: Object, reason: str, message: str, type: str, now: str) -> Object:
        metadata = about.get("metadata") or {}
        # Events of cluster-scoped objects live in the namespace "default".
        namespace = metadata.get("namespace") or "default"
        digest = hashlib.sha256(f"{key}\0{self._host}\0{self._now().isoformat()}".encode()).hexdigest()[:16]
        reference = {
            "apiVersion": about.get("apiVersion"),
            "kind": about.get("kind"),
            "name": metadata.get("name"),
            "namespace": metadata.get("namespace"),
            "uid": metadata.get("uid"),
            "resourceVersion": metadata.get("resourceVersion"),
        }
        source = {"component": self._component} | ({"host": self._host} if self._host else {})
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{str(metadata.get('name'))[:230]}.{digest}", "namespace": namespace},
            "involvedObject": {field: value for field, value in reference.items() if value},
            "reason": reason,
            "message": message,
            "type": type,
            "source": source,
            "reportingComponent": self._component,
            "reportingInstance": self._host,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
        }

    def _allowed(self, identity: str) -> bool:
        now = self._now().timestamp()
        budget = self._budgets.pop(identity, None) or _Budget(BURST, now)
        self._budgets[identity] = budget
        while len(self._budgets) > REMEMBERED:
            self._budgets.popitem(last=False)
        budget.tokens = min(BURST, budget.tokens + max(0.0, now - budget.at) * REFILL_PER_SECOND)
        budget.at = now
        if budget.tokens < 1:
            return False
        budget.tokens -= 1
        return True

    def _lock(self, key: str) -> asyncio.Lock:
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        return lock

    def _unlock(self, key: str) -> None:
        lock, users = self._locks[key]
        if users == 1:
            del self._locks[key]
        else:
            self._locks[key] = (lock, users - 1)
