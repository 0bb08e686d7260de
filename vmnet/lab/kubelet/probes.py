"""Container probes: exec in the pod, HTTP and TCP from the node's namespace, as kubelet does."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

Execute = Callable[[Sequence[str], float], Awaitable[tuple[int, str]]]
"""Run words in the container: (exit status, output). Raises TimeoutError."""


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """The numbers of a probe, with the API's defaults."""

    initial_delay: float
    period: float
    timeout: float
    successes: int
    failures: int

    @classmethod
    def of(cls, probe: Mapping[str, Any]) -> "ProbeSettings":
        """From a Probe of the API."""
        return cls(
            initial_delay=float(probe.get("initialDelaySeconds") or 0),
            period=float(probe.get("periodSeconds") or 10),
            timeout=float(probe.get("timeoutSeconds") or 1),
            successes=int(probe.get("successThreshold") or 1),
            failures=int(probe.get("failureThreshold") or 3),
        )


async def attempt(probe: Mapping[str, Any], container: Mapping[str, Any], address: str, execute: Execute) -> str | None:
    """One attempt: None when it succeeded, else why it failed."""
    timeout = ProbeSettings.of(probe).timeout
    try:
        async with asyncio.timeout(timeout):
            if "exec" in probe:
                status, output = await execute(probe["exec"].get("command") or [], timeout)
                return None if status == 0 else f"exit status {status}: {output.strip()[-200:]}"
            if "httpGet" in probe:
                return await _http(probe["httpGet"], container, address, timeout)
            if "tcpSocket" in probe:
                host = probe["tcpSocket"].get("host") or address
                await _tcp(host, port_number(probe["tcpSocket"]["port"], container))
                return None
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except (OSError, aiohttp.ClientError, ValueError) as error:
        return str(error) or type(error).__name__
    return "the lab's kubelet knows exec, httpGet and tcpSocket probes only"


async def watch(
    settings: ProbeSettings, once: Callable[[], Awaitable[str | None]], result: Callable[[bool, str], None], ready: bool
) -> None:
    """Probe for ever; ``result(True or False, why)`` when a threshold is crossed. ``ready``: the state at the start."""
    await asyncio.sleep(settings.initial_delay)
    state, run = ready, 0
    while True:
        failure = await once()
        good = failure is None
        run = run + 1 if good != state else 0
        if run >= (settings.successes if good else settings.failures):
            state, run = good, 0
            result(good, failure or "")
        await asyncio.sleep(settings.period)


async def _http(action: Mapping[str, Any], container: Mapping[str, Any], address: str, timeout: float) -> str | None:
    host = action.get("host") or address
    if ":" in host:
        host = f"[{host}]"
    scheme = str(action.get("scheme") or "HTTP").lower()
    path = action.get("path") or "/"
    url = f"{scheme}://{host}:{port_number(action['port'], container)}{path if path.startswith('/') else '/' + path}"
    headers = {item["name"]: item["value"] for item in action.get("httpHeaders") or []}
    # A probe does not verify certificates: it asks whether the server lives.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
        session.get(url, headers=headers, ssl=context, allow_redirects=False) as response,
    ):
        return None if 200 <= response.status < 400 else f"HTTP status {response.status}"


async def _tcp(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()


def port_number(port: int | str, container: Mapping[str, Any]) -> int:
    """A probe's port: a number, or the name of one of the container's. Raises ValueError."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for item in container.get("ports") or []:
        if item.get("name") == port:
            return int(item["containerPort"])
    raise ValueError(f"the container has no port named {port!r}")
