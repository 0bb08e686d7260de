"""Lists and watches: selectors, paging, replay, bookmarks and waiting for a resourceVersion."""

import asyncio
import base64
import binascii
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from vmnet.lab.apiserver import representations, selectors
from vmnet.lab.apiserver.requests import ListOptions
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import ApiError, bad_request, too_large_version
from vmnet.lab.apiserver.storage import Change, ChangeType, Expired, Key, Object, Store, Stored

BOOKMARK_SECONDS: Final = 60.0
LAST_BOOKMARK_SECONDS: Final = 2.0
"""One more bookmark comes this long before a watch ends, so that its successor has little to replay."""
PATIENCE_SECONDS: Final = 3.0
"""How long a request waits for a resourceVersion that is not there yet."""
QUEUE: Final = 16384
"""Changes a watcher may be behind before it is cut off; it then lists again."""
STREAMING: Final = web.RequestKey("streaming", bool)
"""Set on a request whose answer has begun."""
_TOKEN_VERSION: Final = "meta.k8s.io/v1"  # noqa: S105
_TOO_OLD: Final = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results. "
    "Continuing with the provided token results in an inconsistent list - objects that were created, modified, or "
    "deleted between the time the first chunk was returned and now may show up in the list."
)


@dataclass(frozen=True, slots=True)
class Scope:
    """Which objects of a resource: a namespace (None: all) and the selectors."""

    info: ResourceInfo
    namespace: str | None
    labels: selectors.LabelSelector
    fields: selectors.FieldSelector

    def matches(self, stored: Stored) -> bool:
        """Whether an object is meant."""
        if self.namespace is not None and stored.obj["metadata"].get("namespace") != self.namespace:
            return False
        if self.labels and not selectors.matches_labels(self.labels, stored.obj):
            return False
        return not self.fields or selectors.matches_fields(self.fields, stored.at(self.info.api_version))

    @property
    def selective(self) -> bool:
        """Whether there is a selector."""
        return bool(self.labels or self.fields)


@dataclass(frozen=True, slots=True)
class Page:
    """The result of a list."""

    items: list[Stored]
    metadata: Object


def _version(text: str) -> int | None:
    if text in ("", "0"):
        return None
    if not text.isdigit():
        raise ValueError(
            f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
        )
    return int(text)


def _sort_key(key: Key) -> str:
    """Position in the order of storage keys: by namespace, then name, as one path."""
    return f"{key[0]}/{key[1]}" if key[0] else key[1]


def encode_continue(version: int, start: str) -> str:
    """A continue token."""
    content = json.dumps({"v": _TOKEN_VERSION, "rv": version, "start": start}, separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def decode_continue(token: str) -> tuple[int, str]:
    """Version (-1: the newest) and start of a continue token. Raises ApiError (400)."""
    try:
        content = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        if content["v"] != _TOKEN_VERSION:
            raise ValueError("unknown version")
        return int(content["rv"]), str(content["start"]).removeprefix("/")
    except (binascii.Error, ValueError, KeyError, TypeError) as error:
        raise bad_request(f"invalid continue token: continue key is not valid: {error}") from error


async def wait_for_version(store: Store, version: int) -> None:
    """Return once the store has reached ``version``. Raises ApiError (504) when that takes too long."""
    if version <= store.version:
        return
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while store.version < version:
        if loop.time() >= deadline:
            raise too_large_version(version, store.version)
        await asyncio.sleep(0.05)


async def collect(store: Store, scope: Scope, options: ListOptions) -> Page:
    """List. Raises ApiError."""
    info = scope.info
    collection = store.collection(info.storage_key)
    start = ""
    try:
        version = _version(options.resource_version)
    except ValueError as error:
        raise bad_request(f"invalid resource version: {error}") from error
    exact: int | None = None
    if options.continuation:
        if options.resource_version not in ("", "0"):
            raise bad_request("specifying resource version is not allowed when using continue")
        exact, start = decode_continue(options.continuation)
        if exact < 0:
            exact = None
    elif version is not None:
        await wait_for_version(store, version)
        if options.match == "Exact":
            exact = version
    try:
        objects = collection.objects if exact is None else collection.at(exact)
    except Expired:
        if options.continuation:
            metadata = {"continue": encode_continue(-1, start)}
            raise ApiError(410, "Expired", _TOO_OLD, metadata=metadata) from None
        raise ApiError(410, "Expired", "The resourceVersion for the provided list is too old.") from None
    shown = store.version if exact is None else exact
    # At resourceVersion 0 the real server answers from its cache, which does not page.
    limit = 0 if options.resource_version == "0" and not options.continuation else options.limit
    return _page(objects, scope, shown, start, limit)


def _page(objects: dict[Key, Stored], scope: Scope, version: int, start: str, limit: int) -> Page:
    namespace = scope.namespace
    keys = [key for key in objects if namespace is None or key[0] == namespace]
    if namespace is not None:
        ordered = sorted((key[1], key) for key in keys)
    else:
        ordered = sorted((_sort_key(key), key) for key in keys)
    metadata: Object = {"resourceVersion": str(version)}
    items: list[Stored] = []
    for position, (path, key) in enumerate(ordered):
        if path < start:
            continue
        stored = objects[key]
        if not scope.matches(stored):
            continue
        items.append(stored)
        if limit and len(items) == limit:
            rest = ordered[position + 1 :]
            if any(scope.matches(objects[key]) for _, key in rest):
                metadata["continue"] = encode_continue(version, f"/{path}\0")
                if not scope.selective:
                    metadata["remainingItemCount"] = len(rest)
            break
    return Page(items, metadata)


class _Watcher:
    """Changes of one resource, as one watch sees them."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.queue: deque[Change] = deque()
        self.ready = asyncio.Event()
        self.overrun = False

    def offer(self, change: Change) -> None:
        """Take note of a change; called within the write."""
        namespace = self.scope.namespace
        if namespace is not None and change.key[0] != namespace:
            return
        if len(self.queue) >= QUEUE:
            self.overrun = True
        else:
            self.queue.append(change)
        self.ready.set()

    def seen(self, change: Change) -> tuple[str, Stored] | None:
        """Type and object of the event that a change is to this watch; None if it is none."""
        scope = self.scope
        previous = change.previous
        if change.type is ChangeType.DELETED:
            if previous is not None and scope.matches(previous):
                return "DELETED", change.current
            return None
        now = scope.matches(change.current)
        before = previous is not None and scope.matches(previous)
        if now:
            return ("MODIFIED" if before else "ADDED"), change.current
        if before and previous is not None:
            # What leaves the selection is shown as it was, under the version at which it left.
            metadata = {**previous.obj["metadata"], "resourceVersion": str(change.version)}
            return "DELETED", Stored({**previous.obj, "metadata": metadata}, change.version)
        return None


async def stream(
    request: web.Request,
    store: Store,
    scope: Scope,
    options: ListOptions,
    renderer: representations.Renderer,
    prepared: Callable[[web.StreamResponse], None] = lambda _response: None,
) -> web.StreamResponse:
    """Watch, until its timeout or until the client or the server goes away. Raises ApiError before it starts."""
    try:
        version = _version(options.resource_version)
    except ValueError as error:
        raise ApiError(500, "", str(error)) from error
    initial = options.send_initial_events
    if initial is None:
        initial = version is None
    mark_end = bool(options.send_initial_events) or (
        options.send_initial_events is None and version is None and options.bookmarks
    )
    loop = asyncio.get_running_loop()
    seconds = options.timeout if options.timeout else random.uniform(1800, 3600)  # noqa: S311
    deadline = loop.time() + seconds
    response = web.StreamResponse(
        headers={"Content-Type": renderer.representation.content_type, "Cache-Control": "no-cache, private"}
    )
    response.enable_chunked_encoding()
    prepared(response)
    await response.prepare(request)
    request[STREAMING] = True
    watcher = _Watcher(scope)
    collection = store.collection(scope.info.storage_key)
    sent = False

    def render(kind: str, stored: Stored) -> bytes:
        nonlocal sent
        line = renderer.event(kind, stored, first=not sent)
        sent = True
        return line

    if options.send_initial_events and version is not None:
        try:
            await wait_for_version(store, version)
        except ApiError as error:
            await response.write(representations.error_line(error.status))
            await response.write_eof()
            return response
    floor = 0
    lines: list[bytes] = []
    try:
        replay = collection.since(version) if version is not None and not initial else []
    except Expired as expired:
        status = ApiError(410, "Expired", str(expired)).status
        await response.write(representations.error_line(status))
        await response.write_eof()
        return response
    if version is not None and not initial:
        floor = version
    if initial:
        for key in sorted(collection.objects, key=_sort_key):
            stored = collection.objects[key]
            if scope.matches(stored):
                lines.append(render("ADDED", stored))
        if mark_end and options.bookmarks:
            lines.append(renderer.bookmark(store.version, initial_end=True))
    for change in replay:
        seen = watcher.seen(change) if scope.namespace in (None, change.key[0]) else None
        if seen is not None:
            lines.append(render(*seen))
    # No await lies between the snapshot above and this, so no change is missed or seen twice.
    end = store.listen(scope.info.storage_key, watcher.offer)
    next_bookmark = loop.time() + BOOKMARK_SECONDS
    if 0 < deadline - LAST_BOOKMARK_SECONDS - loop.time() < BOOKMARK_SECONDS:
        next_bookmark = deadline - LAST_BOOKMARK_SECONDS
    try:
        while not watcher.overrun:
            if lines:
                await response.write(b"".join(lines))
                lines = []
            now = loop.time()
            if now >= deadline:
                break
            if options.bookmarks and now >= next_bookmark:
                lines.append(renderer.bookmark(max(store.version, floor)))
                next_bookmark = now + BOOKMARK_SECONDS
                if now < deadline - LAST_BOOKMARK_SECONDS < next_bookmark:
                    next_bookmark = deadline - LAST_BOOKMARK_SECONDS
                continue
            if not watcher.queue:
                watcher.ready.clear()
                wake = min(deadline, next_bookmark) if options.bookmarks else deadline
                try:
                    async with asyncio.timeout_at(wake):
                        await watcher.ready.wait()
                except TimeoutError:
                    continue
            while watcher.queue:
                change = watcher.queue.popleft()
                if change.version <= floor:
                    continue
                seen = watcher.seen(change)
                if seen is not None:
                    lines.append(render(*seen))
    finally:
        end()
    await response.write_eof()
    return response
