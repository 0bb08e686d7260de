"""The real API: raw JSON over HTTP/1.1.

``kubernetes.aio`` reads the kubeconfig and knows every way to authenticate; its typed models and its ``Watch`` are not
used (measured: models are ten times slower than raw JSON and raise on sparse objects; ``Watch`` reconnects without
back-off and repeats an expired resourceVersion).
"""

import asyncio
import json
import os
import random
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import yaml
from aiohttp.client_reqrep import ClientResponse
from yarl import URL

from vmnet.kube import codec
from vmnet.kube.api import (
    Forbidden,
    Kube,
    KubeError,
    Object,
    ObjectList,
    PatchType,
    Resource,
    Unavailable,
    WatchEvent,
)

PAGE_SIZE: Final = 500
"""Objects per page of a list: one page decodes in about 20 ms, so the event loop is never blocked for long."""
_KUBECONFIG: Final = "KUBECONFIG"
_IN_CLUSTER: Final = "KUBERNETES_SERVICE_HOST"

Header = Callable[[bool], Awaitable[str | None]]
"""Value of the Authorization header, or None; called with True after the API refused the last one."""


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that notices a dead peer: without keep-alive a watch on a lost node hangs until its idle limit."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    return made


class KubeClient(Kube):
    """One API server. Made by ``connect``; belongs to one event loop."""

    def __init__(
        self,
        server: str,
        *,
        user_agent: str,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        proxy: str | None = None,
        authorization: Header | None = None,
        request_seconds: float = 30.0,
        watch_seconds: float = 240.0,
        watch_grace_seconds: float = 15.0,
    ) -> None:
        """``server``: base URL. ``watch_seconds``: how long the server is asked to keep one watch open.

        A watch over which nothing at all came for that time and ``watch_grace_seconds`` more is given up.
        """
        self._server = server.rstrip("/")
        self._headers = {"User-Agent": user_agent, "Accept": "application/json"}
        self._server_name = server_name
        self._proxy = proxy
        self._authorization = authorization
        self._request_seconds = request_seconds
        self._watch_seconds = watch_seconds
        self._watch_grace_seconds = watch_grace_seconds
        connector = aiohttp.TCPConnector(limit=0, ssl=tls if tls is not None else True, socket_factory=_socket)
        self._session = aiohttp.ClientSession(connector=connector)

    @classmethod
    async def connect(
        cls,
        kubeconfig: Path | None = None,
        *,
        user_agent: str,
        request_seconds: float = 30.0,
        context: str | None = None,
    ) -> Self:
        """Read the configuration: ``kubeconfig``, else ``$KUBECONFIG``, else the pod's own, else ``~/.kube/config``.

        ``context``: one of the file's, in place of its current one. Makes no request. Raises KubeError when there is no
        usable configuration.
        """
        # Importing these costs 0.4 s: only what really talks to an API pays for it.
        from kubernetes.aio import config
        from kubernetes.aio.client import Configuration
        from kubernetes.aio.client.rest import RESTClientObject

        configuration = Configuration(host="")
        loader = None
        default = Path.home() / ".kube" / "config"
        path = str(kubeconfig) if kubeconfig else os.environ.get(_KUBECONFIG, "")
        if not path and _IN_CLUSTER not in os.environ and default.exists():
            path = str(default)
        try:
            if path:
                loader = await config.load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=path, context=context, client_configuration=configuration, persist_config=False
                )
            else:
                config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except (config.ConfigException, OSError, ValueError, yaml.YAMLError) as error:
            raise KubeError(f"no usable Kubernetes configuration in {path or 'this pod'}: {error}") from error
        if not configuration.host:
            raise KubeError(f"{path} names no cluster: its current context is missing or empty")

        async def authorization(refused: bool) -> str | None:
            if refused and loader is not None:
                # Runs an exec plugin again when its token has expired, and reads a token file again.
                await loader.load_and_set(configuration)
            value = await configuration.get_api_key_with_prefix("BearerToken")
            return str(value).strip() if value else None

        tls = RESTClientObject(configuration).ssl_context if configuration.host.startswith("https") else None
        return cls(
            configuration.host,
            user_agent=user_agent,
            tls=tls,
            server_name=configuration.tls_server_name,
            proxy=configuration.proxy,
            authorization=authorization,
            request_seconds=request_seconds,
        )

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """One object."""
        return await self._request("GET", resource.path(namespace, name))

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> ObjectList:
        """All objects, page by page. Raises Expired when the pages' snapshot was compacted meanwhile."""
        query = _selectors(labels, fields) | {"limit": str(PAGE_SIZE)}
        items: list[Object] = []
        while True:
            page = await self._request("GET", resource.path(namespace), query=query)
            items.extend(codec.named(item, resource) for item in page.get("items") or ())
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return ObjectList(tuple(items), str(metadata.get("resourceVersion", "")))
            query["continue"] = metadata["continue"]

    async def create(self, resource: Resource, body: Object, namespace: str | None = None) -> Object:
        """POST to the collection of ``namespace``, or of the object's own."""
        where = namespace or body.get("metadata", {}).get("namespace")
        return await self._request("POST", resource.path(where), body=body)

    async def replace(self, resource: Resource, body: Object, *, subresource: str | None = None) -> Object:
        """PUT."""
        metadata = body["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"], subresource)
        return await self._request("PUT", path, body=body)

    async def patch(
        self,
        resource: Resource,
        name: str,
        body: object,
        namespace: str | None = None,
        *,
        type: PatchType = PatchType.MERGE,
        subresource: str | None = None,
        field_manager: str | None = None,
        force: bool = False,
    ) -> Object:
        """PATCH."""
        query = {"fieldManager": field_manager} if field_manager else {}
        if force:
            query["force"] = "true"
        path = resource.path(namespace, name, subresource)
        return await self._request("PATCH", path, query=query, body=body, content_type=type.value)

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """DELETE."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        await self._request("DELETE", resource.path(namespace, name), body=options)

    async def watch(
        self,
        resource: Resource,
        resource_version: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """One watch connection. Raises Unavailable also when the server keeps silent beyond its own limit."""
        # Spread, so that the watches that one restart began do not end together for ever after.
        seconds = max(1, round(self._watch_seconds * random.uniform(0.8, 1.0)))  # noqa: S311
        query = _selectors(labels, fields) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(seconds),
        }
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=self._request_seconds,
            sock_read=self._watch_seconds + self._watch_grace_seconds,
        )
        try:
            response = await self._send("GET", resource.path(namespace), query=query, timeout=timeout)
            async with response, aclosing(_lines(response)) as lines:
                async for line in lines:
                    yield codec.decode_event(line, resource)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"watch of {resource.plural}: {_reason(error)}") from error

    async def close(self) -> None:
        """Give up all connections."""
        await self._session.close()

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
    ) -> Object:
        timeout = aiohttp.ClientTimeout(total=self._request_seconds)
        try:
            response = await self._send(
                method, path, query=query, body=body, content_type=content_type, timeout=timeout
            )
            async with response:
                return codec.decode_object(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{method} {path}: {_reason(error)}") from error

    async def _send(
        self,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,
        query: dict[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
    ) -> ClientResponse:
        """The response to a request that the API accepted. Raises KubeError for the others."""
        data = None if body is None else json.dumps(body).encode()
        for refused in (False, True):
            headers = dict(self._headers)
            if data is not None:
                headers["Content-Type"] = content_type
            if self._authorization is not None:
                async with asyncio.timeout(self._request_seconds):
                    value = await self._authorization(refused)
                if value:
                    headers["Authorization"] = value
            response = await self._session.request(
                method,
                URL(self._server + path),
                params=query,
                data=data,
                headers=headers,
                timeout=timeout,
                proxy=self._proxy,
                server_hostname=self._server_name,
                allow_redirects=False,
            )
            if response.status < 300:
                return response
            async with response:
                async with asyncio.timeout(self._request_seconds):
                    text = await response.read()
            error = codec.decode_error(response.status, text, response.headers.get("Retry-After"))
            if response.status != 401 or self._authorization is None or refused:
                raise error
        raise Forbidden(f"{method} {path}: not authenticated")


def _selectors(labels: str, fields: str) -> dict[str, str]:
    found = {"labelSelector": labels, "fieldSelector": fields}
    return {key: value for key, value in found.items() if value}


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def _lines(response: ClientResponse) -> AsyncGenerator[bytes, None]:
    """Lines of any length (aiohttp's own reader limits them): one event may be a megabyte."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        rest += chunk
        if b"\n" not in chunk:
            continue
        *lines, tail = bytes(rest).split(b"\n")
        rest = bytearray(tail)
        for line in lines:
            if line.strip():
                yield line
    if rest.strip():
        # No newline at the end: half an event, or a proxy's page where events should be. Decoding tells.
        yield bytes(rest)
