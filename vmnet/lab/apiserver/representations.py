"""Objects, lists and events as bytes, in the representation that the client asked for."""

import json
from collections.abc import Sequence
from typing import Any, Final

import yaml
from aiohttp import web

from vmnet.lab.apiserver import tables
from vmnet.lab.apiserver.requests import Representation
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.storage import Object, Stored, encode

_HEADERS: Final = {"Cache-Control": "no-cache, private"}


def body(obj: Object, representation: Representation) -> bytes:
    """One object."""
    if representation.media == "yaml":
        return yaml.safe_dump(obj, allow_unicode=True).encode()
    return encode(obj) + b"\n"


def answer(
    content: bytes, representation: Representation, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A complete answer."""
    return web.Response(
        body=content,
        status=status,
        headers={**_HEADERS, "Content-Type": representation.content_type, **(headers or {})},
    )


def partial(obj: Object, version: str) -> Object:
    """PartialObjectMetadata of an object."""
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": obj["metadata"],
    }


class Renderer:
    """Turns stored objects of one resource into what one request wants to see."""

    def __init__(
        self, registry: Registry, info: ResourceInfo, representation: Representation, include: str = "Metadata"
    ) -> None:
        self._info = info
        self._definition = registry.definition(info)
        self.representation = representation
        self._include = include or "Metadata"
        self._prefix = len(encode({"kind": info.kind, "apiVersion": info.api_version})) - 1

    def single(self, obj: Object) -> bytes:
        """One object."""
        form = self.representation.form
        if form == "Table":
            obj = self._table([obj], {"resourceVersion": obj["metadata"].get("resourceVersion", "")})
        elif form:
            obj = partial(obj, self.representation.version)
        return body(obj, self.representation)

    def stored(self, stored: Stored) -> bytes:
        """One stored object, from its kept bytes where that is what is wanted."""
        if not self.representation.form and self.representation.media == "json":
            return stored.encode(self._info.api_version) + b"\n"
        return self.single(stored.at(self._info.api_version))

    def collection(self, items: Sequence[Stored], metadata: Object) -> bytes:
        """A list."""
        info, form = self._info, self.representation.form
        version = info.api_version
        if form == "Table":
            return body(self._table([item.at(version) for item in items], metadata), self.representation)
        if form:
            wanted = self.representation.version
            found = {
                "kind": "PartialObjectMetadataList",
                "apiVersion": f"meta.k8s.io/{wanted}",
                "metadata": metadata,
                "items": [partial(item.at(version), wanted) for item in items],
            }
            return body(found, self.representation)
        if self._definition is not None:
            metadata = {"continue": "", **metadata}
        head = {"kind": info.list_kind, "apiVersion": version, "metadata": metadata}
        if self.representation.media == "yaml":
            return body({**head, "items": [item.at(version) for item in items]}, self.representation)
        opening = encode(head)[:-1] + b',"items":['
        if self._definition is not None:
            return opening + b",".join(item.encode(version) for item in items) + b"]}\n"
        # Items of built-in lists carry neither kind nor apiVersion; both stand at the front of the kept bytes.
        return opening + b",".join(b"{" + item.encode(version)[self._prefix + 1 :] for item in items) + b"]}\n"

    def event(self, kind: str, stored: Stored, *, first: bool) -> bytes:
        """One line of a watch; ``first``: nothing was sent before it (Tables then carry their columns)."""
        if not self.representation.form:
            return b'{"type":"%s","object":%s}\n' % (kind.encode(), stored.encode(self._info.api_version))
        obj = stored.at(self._info.api_version)
        if self.representation.form == "Table":
            metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            shown = self._table([obj], metadata, with_columns=first)
        else:
            shown = partial(obj, self.representation.version)
        return b'{"type":"%s","object":%s}\n' % (kind.encode(), encode(shown))

    def bookmark(self, version: int, *, initial_end: bool = False) -> bytes:
        """A BOOKMARK line."""
        metadata: Object = {"resourceVersion": str(version)}
        if initial_end:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj: Object = {"kind": self._info.kind, "apiVersion": self._info.api_version, "metadata": metadata}
        if self.representation.form == "Table":
            row = {"cells": [], "object": partial(obj, self.representation.version)}
            obj = {
                "kind": "Table",
                "apiVersion": f"meta.k8s.io/{self.representation.version}",
                "metadata": {"resourceVersion": str(version)},
                "columnDefinitions": None,
                "rows": [row],
            }
        elif self.representation.form:
            obj = partial(obj, self.representation.version)
        return b'{"type":"BOOKMARK","object":%s}\n' % encode(obj)

    def _table(self, objects: list[Object], metadata: Object, *, with_columns: bool = True) -> Object:
        found: dict[str, Any] = tables.table(
            self._info, self._definition, objects, metadata, self._include, with_columns
        )
        found["apiVersion"] = f"meta.k8s.io/{self.representation.version}"
        return found


def error_line(status: Object) -> bytes:
    """An ERROR line of a watch."""
    return b'{"type":"ERROR","object":%s}\n' % encode(status)


def warning_headers(response: web.StreamResponse, warnings: Sequence[str]) -> None:
    """One Warning header per message."""
    for text in dict.fromkeys(warnings):
        escaped = json.dumps(text, ensure_ascii=False)
        response.headers.add("Warning", f"299 - {escaped}")
