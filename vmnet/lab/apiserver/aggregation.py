"""Requests that others answer: mounted API groups, and pod subresources that the pod's node serves."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from aiohttp import web

from vmnet.lab.apiserver.objects import NODES
from vmnet.lab.apiserver.status import ApiError, bad_request
from vmnet.lab.apiserver.storage import Object, Store

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NodeProxy = Callable[[web.Request, Object], Awaitable[web.StreamResponse]]
"""Answers a request for exec, log, attach or portforward of a pod."""

PROXIED: Final = ("exec", "log", "attach", "portforward")
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailers",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "authorization",
    }
)
"""Headers that belong to one connection (RFC 9110 section 7.6.1), and those that are made anew."""
_WEBSOCKET: Final = frozenset(
    {"sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol"}
)
_CONNECT_SECONDS: Final = 10.0
_MAX_MESSAGE: Final = 16 * 1024 * 1024


@dataclass(slots=True)
class Mounts:
    """API groups that handlers of their own answer."""

    handlers: dict[tuple[str, str], Handler] = field(default_factory=dict)

    def find(self, path: str) -> Handler | None:
        """The handler of ``/apis/<group>/<version>/…``; None for the group version's own resource list."""
        parts = path.strip("/").split("/")
        if len(parts) < 4 or parts[0] != "apis":
            return None
        return self.handlers.get((parts[1], parts[2]))


def kubelet_url(store: Store, pod: Object) -> str:
    """Address of the kubelet that runs a pod: ``http://<InternalIP>:<port>``. Raises ApiError."""
    node_name = (pod.get("spec") or {}).get("nodeName")
    if not node_name:
        raise bad_request(f"pod {pod['metadata']['name']} does not have a host assigned")
    stored = store.get(NODES, ("", node_name))
    status = (stored.obj.get("status") or {}) if stored else {}
    port = ((status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get("Port")
    address = next(
        (item["address"] for item in status.get("addresses") or () if item.get("type") == "InternalIP"), None
    )
    if not port or not address:
        raise ApiError(500, "InternalError", f'node "{node_name}" has no address or port of its kubelet')
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}"


class KubeletProxy:
    """Forwards to the pod's node, websockets included. The node checks ``token``, which the kubelets know too."""

    def __init__(self, store: Store, token: str) -> None:
        self._store = store
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Give up all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __call__(self, request: web.Request, pod: Object) -> web.StreamResponse:
        """Answer ``/api/v1/namespaces/<ns>/pods/<name>/<subresource>`` by the node's answer to the same path."""
        url = kubelet_url(self._store, pod) + request.raw_path
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in _HOP_BY_HOP and name.lower() not in _WEBSOCKET
        }
        headers["Authorization"] = f"Bearer {self._token}"
        try:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self._websocket(self._session, request, url, headers)
            return await self._plain(self._session, request, url, headers)
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise ApiError(502, "InternalError", f"error dialing backend: {error}") from error

    async def _plain(
        self, session: aiohttp.ClientSession, request: web.Request, url: str, headers: dict[str, str]
    ) -> web.StreamResponse:
        body = await request.read()
        async with session.request(request.method, url, headers=headers, data=body or None) as answer:
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    response.headers.add(name, value)
            response.enable_chunked_encoding()
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _websocket(
        self, session: aiohttp.ClientSession, request: web.Request, url: str, headers: dict[str, str]
    ) -> web.StreamResponse:
        offered = [
            item.strip() for item in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if item.strip()
        ]
        try:
            far = await session.ws_connect(
                url, headers=headers, protocols=offered, autoclose=False, max_msg_size=_MAX_MESSAGE
            )
        except aiohttp.WSServerHandshakeError as error:
            raise ApiError(error.status, "", error.message) from error
        try:
            near = web.WebSocketResponse(
                protocols=(far.protocol,) if far.protocol else (), autoclose=False, max_msg_size=_MAX_MESSAGE
            )
            await near.prepare(request)
            forward = asyncio.ensure_future(_pump(near, far))
            backward = asyncio.ensure_future(_pump(far, near))
            try:
                await asyncio.wait({forward, backward}, return_when=asyncio.FIRST_COMPLETED)
                if forward.done():
                    # The client closed its side; what the node still has to say is short.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await asyncio.shield(backward)
            finally:
                for task in (forward, backward):
                    task.cancel()
                await asyncio.gather(forward, backward, return_exceptions=True)
                await near.close()
            return near
        finally:
            await far.close()


async def _pump(source: Any, sink: Any) -> None:
    """Carry messages until ``source`` closes, then close ``sink`` the same way."""
    async for message in source:
        if message.type is aiohttp.WSMsgType.BINARY:
            await sink.send_bytes(message.data)
        elif message.type is aiohttp.WSMsgType.TEXT:
            await sink.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.PING:
            await sink.ping(message.data)
        elif message.type is aiohttp.WSMsgType.PONG:
            await sink.pong(message.data)
        else:
            break
    code = source.close_code or aiohttp.WSCloseCode.OK
    with contextlib.suppress(ConnectionResetError, RuntimeError):
        await sink.close(code=code if code not in (1005, 1006) else aiohttp.WSCloseCode.OK)
