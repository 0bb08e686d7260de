"""Connections between agents, over the nodes' own addresses: TLS in which each shows whose node it is.

Who may ask what is the handler's to say; here only who is who. Every wait has an end, and of what comes in from others
there is only so much at a time.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from vmnet.model import names
from vmnet.model.endpoint import Node
from vmnet.wire import handover
from vmnet.wire.handover import Message

log = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 3.0
WRITE_SECONDS: Final = 5.0
INCOMING_LIMIT: Final = 64
_LOOK_SECONDS: Final = 0.2
_PATIENCE_SECONDS: Final = 5.0
IDENTITY: Final = "vmnet://agent/"
"""Begins the URI (subject alternative name) that tells whose node's agent a certificate is."""


class Contexts(Protocol):
    """Where TLS contexts come from: None while there is no certificate."""

    @property
    def server(self) -> ssl.SSLContext | None:
        """For those who come."""
        ...

    @property
    def client(self) -> ssl.SSLContext | None:
        """To go to others."""
        ...


class Away(Exception):
    """The other agent cannot be reached, has gone, or is not who it should be."""


class Link:
    """One connection; ``node``: whose agent the other is, by its certificate."""

    def __init__(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.node = node
        self._reader = reader
        self._writer = writer

    async def send(self, message: Message) -> None:
        """Raises Away."""
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                for line in handover.encode(message):
                    self._writer.write(line)
                    await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise Away(f"agent of {self.node}: {error or 'it does not read'}") from error

    async def receive(self, seconds: float) -> Message:
        """The next message. Raises Away when it closes, says nothing for so long, or what nobody understands."""
        try:
            async with asyncio.timeout(seconds):
                line = await self._reader.readline()
        except TimeoutError as error:
            raise Away(f"agent of {self.node} is silent") from error
        except (OSError, ValueError) as error:
            raise Away(f"agent of {self.node}: {error}") from error
        if not line.endswith(b"\n"):
            raise Away(f"agent of {self.node} has closed the connection")
        try:
            return handover.decode(line)
        except ValueError as error:
            raise Away(f"agent of {self.node}: {error}") from error

    async def close(self) -> None:
        """Give it up."""
        self._writer.close()
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._writer.wait_closed()
        except (OSError, TimeoutError) as error:
            log.debug("agent of %s: %s", self.node, error)


Handler = Callable[[Link], Awaitable[None]]


class Peers:
    """The other nodes' agents."""

    def __init__(self, contexts: Contexts, handler: Handler, port: int = names.PEERS_PORT) -> None:
        """``port``: where agents answer, on every node the same."""
        self._contexts = contexts
        self._handler = handler
        self._port = port
        self._incoming: set[asyncio.Task[Any]] = set()

    async def serve(self, address: str) -> None:
        """Answer others until cancelled; begins once there is a certificate."""
        while True:
            context = self._contexts.server
            if context is None:
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            try:
                server = await asyncio.start_server(
                    self._come,
                    address,
                    self._port,
                    ssl=context,
                    ssl_handshake_timeout=CONNECT_SECONDS,
                    limit=handover.LINE_LIMIT,
                    backlog=INCOMING_LIMIT,
                )
                break
            except OSError as error:
                # Migrations do without; the node's other affairs must go on.
                log.error("other agents are not answered: %s", error)
                await asyncio.sleep(_PATIENCE_SECONDS)
        log.info("other agents are answered at %s port %d", address, self._port)
        try:
            async with server:
                await server.serve_forever()
        finally:
            for task in self._incoming:
                task.cancel()
            await asyncio.gather(*self._incoming, return_exceptions=True)

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = _name(writer)
        task = asyncio.current_task()
        if name is None or task is None or len(self._incoming) >= INCOMING_LIMIT:
            log.warning("a connection of %s is refused", name or "nobody that is known")
            writer.close()
            return
        self._incoming.add(task)
        link = Link(name, reader, writer)
        try:
            await self._handler(link)
        except Away as error:
            log.debug("%s", error)
        finally:
            self._incoming.discard(task)
            await link.close()

    @asynccontextmanager
    async def dial(self, node: Node) -> AsyncIterator[Link]:
        """A connection to a node's agent, and to no other's. Raises Away."""
        context = self._contexts.client
        if context is None:
            raise Away("this agent has no certificate yet")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    str(node.address), self._port, ssl=context, limit=handover.LINE_LIMIT
                )
        except (OSError, TimeoutError) as error:
            raise Away(f"agent of {node.name}: {error or 'no answer'}") from error
        link = Link(node.name, reader, writer)
        try:
            if _name(writer) != node.name:
                raise Away(f"who answers at {node.address} is not the agent of {node.name}")
            yield link
        finally:
            await link.close()


def _name(writer: asyncio.StreamWriter) -> str | None:
    """Node of the agent at the other end. The chain of its certificate has been verified by then."""
    certificate = writer.get_extra_info("peercert") or {}
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    return uris[0].removeprefix(IDENTITY) if len(uris) == 1 and uris[0].startswith(IDENTITY) else None
