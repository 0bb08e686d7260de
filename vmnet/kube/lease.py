"""Leader election on a ``coordination.k8s.io`` Lease.

Each request has a time limit well below the renew deadline, so a hung API server cannot keep a leader alive beyond its
lease; expiry of another's lease is judged by this process's own clock, never by comparing wall clocks.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vmnet.kube.api import LEASES, Conflict, Kube, KubeError, NotFound
from vmnet.kube.codec import encode_micro_time

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. ``request`` < ``renew_deadline`` < ``lease``; the leading task must stop within their difference."""

    lease: int = 15
    renew_deadline: float = 10.0
    retry: float = 2.0
    request: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.renew_deadline < self.lease or not 0 < self.request < self.renew_deadline:
            raise ValueError(f"a lease needs retry and request < renew_deadline < lease: {self}")


class Elector:
    """One candidate. ``leading`` is True exactly while the leading task may run."""

    def __init__(self, kube: Kube, *, namespace: str, name: str, identity: str, timing: Timing | None = None) -> None:
        """``identity`` must be unique per process: pod name and a random suffix."""
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._timing = timing or Timing()
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0
        self._renewed = 0.0
        self.leading = False
        self.leader = ""
        """Identity that holds the lease, as last seen."""

    async def run(self, leading: Callable[[], Awaitable[None]]) -> None:
        """Wait for the lease, run ``leading`` while it is held, release it.

        When leadership is lost, or cannot be proven before the renew deadline, the leading task is cancelled, awaited,
        and the wait begins again. Returns when ``leading`` returns; raises what it raises.
        """
        while True:
            await self._acquire()
            log.info("%s leads %s", self._identity, self._name)
            self.leading = True
            task = asyncio.ensure_future(leading())
            renewal = asyncio.get_running_loop().create_task(self._renew(), name=f"renew {self._name}")
            try:
                await asyncio.wait((task, renewal), return_when=asyncio.FIRST_COMPLETED)
                finished = task.done()
            finally:
                self.leading = False
                renewal.cancel()
                task.cancel()
                _, running = await asyncio.wait(
                    (renewal, task), timeout=self._timing.lease - self._timing.renew_deadline
                )
                if running:
                    # Two leaders are worse than none: the caller must end the process.
                    raise RuntimeError(f"the leading task of {self._name} does not stop")
                await self._release()
            if finished:
                return task.result()
            if not renewal.cancelled() and (error := renewal.exception()) is not None:
                raise error
            log.warning("%s no longer leads %s", self._identity, self._name)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the leading task failed while it was stopped", exc_info=error)

    async def _acquire(self) -> None:
        """Wait until the lease is ours."""
        while True:
            try:
                async with asyncio.timeout(self._timing.request):
                    if await self._try():
                        return
            except Conflict:
                log.debug("%s: somebody else wrote the lease", self._name)
            except (KubeError, TimeoutError) as error:
                log.warning("%s: cannot try for the lease: %s", self._name, error or "timed out")
            await asyncio.sleep(self._timing.retry * random.uniform(0.8, 1.2))  # noqa: S311

    async def _renew(self) -> None:
        """Renew until the lease is lost or can no longer be proven ours; then return."""
        clock = asyncio.get_running_loop().time
        while True:
            left = self._renewed + self._timing.renew_deadline - clock()
            await asyncio.sleep(max(0.0, min(self._timing.retry, left)))
            left = self._renewed + self._timing.renew_deadline - clock()
            if left <= 0:
                log.error("%s: not renewed for %.1f s, giving up", self._name, clock() - self._renewed)
                return
            try:
                async with asyncio.timeout(min(self._timing.request, left)):
                    if not await self._try():
                        log.error("%s: now held by %s", self._name, self.leader)
                        return
            except Conflict:
                log.info("%s: the lease changed under us, reading it again", self._name)
            except (KubeError, TimeoutError) as error:
                log.warning("%s: cannot renew the lease: %s", self._name, error or "timed out")

    async def _try(self) -> bool:
        """Take or renew the lease if nobody else holds it. The proof dates from *before* the request was sent."""
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            lease = await self._kube.get(LEASES, self._name, self._namespace)
        except NotFound:
            spec = self._spec(transitions=0)
            body = {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": self._name, "namespace": self._namespace},
                "spec": spec,
            }
            await self._kube.create(LEASES, body, self._namespace)
            self._renewed, self.leader = started, self._identity
            return True
        spec = lease.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        seen = (holder, str(spec.get("renewTime") or ""))
        if seen != self._seen:
            self._seen, self._seen_at = seen, clock()
        self.leader = holder
        if holder and holder != self._identity:
            duration = float(spec.get("leaseDurationSeconds") or self._timing.lease)
            if self.leading or clock() - self._seen_at < duration:
                return False
        transitions = int(spec.get("leaseTransitions") or 0) + (holder != self._identity)
        acquired = spec.get("acquireTime") if holder == self._identity else None
        lease = lease | {"spec": spec | self._spec(transitions, acquired)}
        # The resourceVersion makes it conditional: of two that see an expired lease, one gets Conflict.
        await self._kube.replace(LEASES, lease)
        self._renewed, self.leader = started, self._identity
        return True

    def _spec(self, transitions: int, acquired: str | None = None) -> dict[str, Any]:
        now = encode_micro_time(datetime.now(UTC))
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._timing.lease,
            "acquireTime": acquired or now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }

    async def _release(self) -> None:
        """Let the next leader start at once."""
        try:
            async with asyncio.timeout(self._timing.request):
                # Read again: our last write may have been carried out although its answer was lost.
                lease = await self._kube.get(LEASES, self._name, self._namespace)
                spec = lease.get("spec") or {}
                if spec.get("holderIdentity") == self._identity:
                    lease = lease | {"spec": spec | {"holderIdentity": "", "leaseDurationSeconds": 1}}
                    await self._kube.replace(LEASES, lease)
                    self.leader = ""
        except (KubeError, TimeoutError) as error:
            log.info("%s: not released, it will expire: %s", self._name, error or "timed out")
