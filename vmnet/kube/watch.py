"""The list-watch: a store of objects that follows the API through everything that can go wrong with a watch."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Final

from vmnet.kube.api import (
    EventType,
    Expired,
    Handler,
    Informer,
    Invalid,
    Kube,
    KubeError,
    NotFound,
    Object,
    Resource,
    WatchEvent,
    object_key,
)
from vmnet.kube.codec import retry_after
from vmnet.runtime.backoff import Backoff

log = logging.getLogger(__name__)

HEALTHY_SECONDS: Final = 5.0
"""A watch that lasted this long proves that the API works: the back-off starts again from the beginning."""
QUIET_SECONDS: Final = 120.0
"""A server sends bookmarks about once a minute; a watch that brought nothing for this long follows nothing."""
_PROGRESS_FAILURES: Final = 3
"""A watch that brought events but broke soon waits no longer than after this many failures."""


class ListWatch(Informer):
    """Keeps ``items`` current until cancelled. Handlers run in the order of the API's events, in the loop's thread.

    - The list is read in pages; what is in the store and not in a new list was deleted, and handlers learn of it.
    - 410 (as HTTP status or in the stream) lists again. EOF, reset, 5xx, plain-text answers and silence reconnect from
      the last resourceVersion seen, bookmarks included. Every way round the loop waits a growing, jittered time unless
      the watch was healthy, so no server can make it spin.
    - A long watch that ended without one event or bookmark lists again: that is how a server restored to an older state
      (its versions are behind ours) would look.
    - A resource that is not served (its CRD is not installed) sets ``missing`` and is looked for every few seconds.
      The store keeps what it has until the 404 has lasted ``gone_seconds``; a restarting server must not look like the
      deletion of everything.
    """

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        optional: bool = False,
        backoff: Backoff | None = None,
        missing_backoff: Backoff | None = None,
        gone_seconds: float = 60.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``optional``: a resource that is not served counts as synced and empty (KubeVirt is not installed)."""
        self.resource = resource
        self.synced = asyncio.Event()
        self.missing = False
        """The API does not serve this resource (404 on the collection)."""
        self.failure: KubeError | None = None
        """Why the store may be behind: the last error, None while a watch is healthy."""
        self._kube = kube
        self._namespace = namespace
        self._labels = labels
        self._fields = fields
        self._optional = optional
        self._backoff = backoff or Backoff()
        self._missing_backoff = missing_backoff or Backoff(first=0.5, most=10.0)
        self._gone_seconds = gone_seconds
        self._chance = chance
        self._store: dict[str, Object] = {}
        self._handlers: list[Handler] = []
        self._version: str | None = None
        self._events = 0

    def add_handler(self, handler: Handler) -> None:
        """Call ``handler`` on every change; objects already in the store are delivered at once."""
        self._handlers.append(handler)
        for item in list(self._store.values()):
            self._call(handler, None, item)

    def get(self, key: str) -> Object | None:
        """From the store, by ``object_key``. Do not change it."""
        return self._store.get(key)

    def items(self) -> Iterable[Object]:
        """All objects of the store, a snapshot. Do not change them."""
        return list(self._store.values())

    async def run(self) -> None:
        """List, watch, recover, until cancelled."""
        loop = asyncio.get_running_loop()
        failures = 0
        missing_since: float | None = None
        while True:
            started = loop.time()
            self._events = 0
            asked = 0.0
            try:
                if self._version is None:
                    await self._list()
                    missing_since = None
                    started = loop.time()
                await self._follow()
                failures = self._after(loop.time() - started, failures)
            except NotFound as error:
                # Its own, slower rhythm: this is a state, not a failure.
                self._version = None
                if missing_since is None:
                    missing_since = loop.time()
                    failures = 0
                self._not_served(error, loop.time() - missing_since)
                failures += 1
                await asyncio.sleep(self._missing_backoff.delay(failures, self._chance()))
                continue
            except (Expired, Invalid) as error:
                self._version = None
                failures = self._after(loop.time() - started, failures)
                self._failed(error)
            except KubeError as error:
                failures = self._after(loop.time() - started, failures)
                asked = retry_after(error)
                self._failed(error)
            await asyncio.sleep(max(asked, self._backoff.delay(failures, self._chance())))

    @property
    def _what(self) -> str:
        return f"{self.resource.plural} in {self._namespace}" if self._namespace else self.resource.plural

    def _after(self, lasted: float, failures: int) -> int:
        """Failures in a row, now that one way round the loop ended after ``lasted`` seconds."""
        if lasted >= QUIET_SECONDS and self._events == 0 and self._version is not None:
            log.info("%s: a whole watch without event or bookmark, listing again", self._what)
            self._version = None
        if lasted >= HEALTHY_SECONDS:
            return 1
        return min(failures + 1, _PROGRESS_FAILURES) if self._events else failures + 1

    async def _list(self) -> None:
        found = await self._kube.list(self.resource, self._namespace, labels=self._labels, fields=self._fields)
        self._version = found.resource_version
        self.failure = None
        if self.missing:
            self.missing = False
            log.info("%s: served now", self._what)
        self._adopt({object_key(item): item for item in found.items})
        self.synced.set()

    async def _follow(self) -> None:
        """Follow one watch connection to its end."""
        stream = self._kube.watch(
            self.resource, self._version or "", self._namespace, labels=self._labels, fields=self._fields
        )
        async with aclosing(stream) as events:  # type: ignore[type-var]
            async for event in events:
                self._events += 1
                self.failure = None
                self._apply(event)

    def _apply(self, event: WatchEvent) -> None:
        version = (event.object.get("metadata") or {}).get("resourceVersion")
        if event.type is not EventType.BOOKMARK:
            key = object_key(event.object)
            if event.type is EventType.DELETED:
                self._remove(key, event.object)
            else:
                self._put(key, event.object)
        if version:
            self._version = str(version)

    def _adopt(self, listed: dict[str, Object]) -> None:
        for key in [key for key in self._store if key not in listed]:
            self._remove(key)
        for key, item in listed.items():
            self._put(key, item)

    def _put(self, key: str, item: Object) -> None:
        old = self._store.get(key)
        if old is not None:
            before, after = old["metadata"], item["metadata"]
            if before.get("uid") != after.get("uid"):
                # Deleted and made again while nobody watched: two changes, not one.
                self._remove(key)
                old = None
            elif before.get("resourceVersion") == after.get("resourceVersion"):
                return
        self._store[key] = item
        self._changed(old, item)

    def _remove(self, key: str, last: Object | None = None) -> None:
        """``last``: the object's final state, if the API told it."""
        old = self._store.pop(key, None)
        if old is not None:
            self._changed(last or old, None)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        for handler in list(self._handlers):
            self._call(handler, old, new)

    def _call(self, handler: Handler, old: Object | None, new: Object | None) -> None:
        try:
            handler(old, new)
        except Exception:
            # One handler's bug must neither hide the event from the others nor end the watch.
            log.exception("%s: a handler failed", self._what)

    def _failed(self, error: KubeError) -> None:
        level = logging.INFO if isinstance(error, Expired) else logging.WARNING
        if self.failure is None or type(self.failure) is not type(error):
            log.log(level, "%s: %s", self._what, error)
        self.failure = error

    def _not_served(self, error: NotFound, seconds: float) -> None:
        if not self.missing:
            self.missing = True
            log.warning("%s: not served by the API (is its CRD installed?)", self._what)
        self.failure = error
        if seconds >= self._gone_seconds and self._store:
            log.warning("%s: not served for %.0f s, its objects are gone", self._what, seconds)
            self._adopt({})
        if self._optional:
            self.synced.set()
