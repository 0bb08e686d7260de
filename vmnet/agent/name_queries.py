"""Telling an administrator what a network is answered, and why: one Unix socket, one question per connection.

A question is a line of JSON, ``{"network": …, "name": …, "type": "A"}``; so is what comes back: ``vmnet dns query``.
"""

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any, Final

import dnslib

from vmnet.agent.responder import Responders
from vmnet_dns.message import Type
from vmnet_dns.server import Explanation

log = logging.getLogger(__name__)

SECONDS: Final = 10.0
LONGEST: Final = 4096
"""Octets of a question."""


class NameQueries:
    """Serves the responders of this node."""

    def __init__(self, path: Path, responders: Responders) -> None:
        self._path = path
        self._responders = responders
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; only root may ask. A socket that a dead agent left behind is replaced."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._server = await asyncio.start_unix_server(self._serve, path=self._path, limit=LONGEST)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                line = await reader.readline()
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            log.info("a question about names was not answered: %s", error)
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            network, name, kind = str(asked["network"]), str(asked["name"]), str(asked.get("type") or "A").upper()
            query = bytes(dnslib.DNSRecord.question(name, kind).pack())
            found = await self._responders.explain(network, query)
        except (ValueError, KeyError, TypeError, dnslib.DNSError) as error:
            return {"error": f"bad question: {error}"}
        if found is None:
            known = ", ".join(self._responders.networks()) or "none"
            return {"error": f"network {network} is not on this node (here: {known})", "elsewhere": True}
        return described(network, name, kind, found)


def described(network: str, name: str, kind: str, found: Explanation) -> dict[str, Any]:
    """The answer as JSON has it. ``outcome``: local, forwarded, cached, stale, failed or refused."""
    answers: list[dict[str, Any]] = []
    with contextlib.suppress(dnslib.DNSError):
        answers = [
            {"name": str(record.rname), "type": _type(record.rtype), "ttl": record.ttl, "data": str(record.rdata)}
            for record in dnslib.DNSRecord.parse(found.wire).rr
        ]
    return {
        "network": network,
        "name": name,
        "type": kind,
        "rcode": found.rcode,
        "outcome": found.outcome,
        "answers": answers,
        "zone": found.zone,
        "alias": found.alias,
        "upstream": found.upstream,
        "upstreams": list(found.asked),
        "ageSeconds": found.age,
    }


def _type(number: int) -> str:
    return Type(number).name if number in Type.__members__.values() else f"TYPE{number}"
