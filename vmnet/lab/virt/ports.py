"""The guest's console and agent port for any number of clients: QEMU serves one, the launcher serves the rest."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Final

_REMEMBERED: Final = 16 * 1024
"""Octets of console output that a new client sees first."""
_LINE: Final = 2**20


class Console:
    """What the guest says goes to all clients, what any of them types to the guest."""

    def __init__(self) -> None:
        self._clients: set[asyncio.StreamWriter] = set()
        self._guest: asyncio.StreamWriter | None = None
        self._recent: deque[bytes] = deque()
        self._kept = 0

    async def run(self, qemu: Path, offered: Path) -> None:
        """Until QEMU closes its end."""
        reader, self._guest = await _connect(qemu)
        server = await asyncio.start_unix_server(self._client, str(offered))
        async with server:
            while data := await reader.read(65536):
                self._recent.append(data)
                self._kept += len(data)
                while self._kept > _REMEMBERED and len(self._recent) > 1:
                    self._kept -= len(self._recent.popleft())
                for client in tuple(self._clients):
                    client.write(data)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            for data in self._recent:
                writer.write(data)
            while data := await reader.read(65536):
                if self._guest is not None:
                    self._guest.write(data)
                    await self._guest.drain()
        except ConnectionError:
            return
        finally:
            self._clients.discard(writer)
            writer.close()


class AgentPort:
    """Requests of all clients over one port: each request gets its client's number before it, each answer loses it."""

    def __init__(self) -> None:
        self._clients: dict[str, asyncio.StreamWriter] = {}
        self._guest: asyncio.StreamWriter | None = None
        self._numbers = 0

    async def run(self, qemu: Path, offered: Path) -> None:
        """Until QEMU closes its end."""
        reader, self._guest = await _connect(qemu)
        self._guest.write(b"\n")
        server = await asyncio.start_unix_server(self._client, str(offered), limit=_LINE)
        async with server:
            while line := await reader.readline():
                number, separator, rest = line.partition(b".")
                client = self._clients.get(number.decode(errors="replace"))
                if client is not None and separator:
                    client.write(rest)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._numbers += 1
        number = str(self._numbers)
        self._clients[number] = writer
        try:
            while line := await reader.readline():
                if line.strip() and line.endswith(b"\n") and self._guest is not None:
                    self._guest.write(number.encode() + b"." + line)
                    await self._guest.drain()
        except (ConnectionError, ValueError):
            return  # gone, or a line beyond all measure
        finally:
            del self._clients[number]
            writer.close()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """QEMU makes its sockets a moment after it was started. The caller's end ends the waiting."""
    while True:
        try:
            return await asyncio.open_unix_connection(str(path), limit=_LINE)
        except OSError:
            await asyncio.sleep(0.02)
