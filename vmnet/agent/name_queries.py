"""Telling an administrator what a network is answered, and why: ``vmnet dns query``.

A question is ``{"network": …, "name": …, "type": "A"}``.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import dnslib

from vmnet.agent.responder import Responders
from vmnet_dns.message import Type
from vmnet_dns.server import Explanation


class NameQueries:
    """Serves the responders of this node."""

    def __init__(self, responders: Responders) -> None:
        self._responders = responders

    async def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one question, or ``{"error": …}``."""
        try:
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
