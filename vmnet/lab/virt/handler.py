"""virt-handler's role on one node: brings QEMU and the instance's status together, and carries out migrations."""

import asyncio
import copy
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.kube.api import NODES, PODS, VMIS, Conflict, Kube, KubeError, NotFound, Object, object_key
from vmnet.kube.codec import decode_time
from vmnet.kube.events import Recorder
from vmnet.kube.watch import ListWatch
from vmnet.lab.virt import domains, kinds, qemu
from vmnet.lab.virt.domains import Domain
from vmnet.lab.virt.instances import current_pod, pods_selector
from vmnet.lab.virt.manifests import DEFAULT_GRACE_SECONDS, memory_of, octets
from vmnet.lab.virt.qemu import Settings
from vmnet.lab.virt.qmp import QemuError
from vmnet.model import names
from vmnet.runtime.queue import KeyedQueue, work
from vmnet.runtime.tasks import TaskScope, TaskSet

log = logging.getLogger(__name__)

COMPONENT: Final = "virt-handler"
CONNECT_SECONDS: Final = 0.5
"""How long one round waits for QEMU's monitor; the key comes back until it is there."""
_AGAIN: Final = 0.2
_AGENT_FAST, _AGENT_SLOW = 0.5, 10.0
"""Seconds between questions to the guest's agent: until it has told addresses of both families, and afterwards."""
_SETTLED_SECONDS: Final = 30.0
"""A guest that has run for so long has all the addresses it is going to get."""
_ACCEPT_SECONDS: Final = 60.0
_HAND_OVER_SECONDS: Final = 10.0
"""How long a source that has sent its guest waits for the target's word before it ends."""

DOWNTIME_AIM_MS: Final = 50
"""The pause to aim at first. With KubeVirt's limit of 900 ms a small guest is stopped with much of its memory still to
send (measured: 90 to 560 ms); with 50 it takes one more round and pauses for 6 to 20."""
_AIM_SECONDS: Final = 1.0
"""How long that is tried before twice as long a pause is allowed, up to the policy's own limit."""

Change = Callable[[Object], None]


class Handler:
    """The instances of one node. ``addresses``: the node's own, for the target's listening socket, best first."""

    def __init__(self, kube: Kube, node: str, addresses: tuple[str, ...]) -> None:
        self._kube = kube
        self._node = node
        self._addresses = addresses
        self._recorder = Recorder(kube, COMPONENT, host=node)
        self._domains: dict[str, Domain] = {}
        self._sending: dict[str, Domain] = {}
        """By migration uid: what this node sends, or has sent, away."""
        self._receiving: dict[str, Domain | None] = {}
        """By migration uid: what this node receives, or has received."""
        self._ask_agent_at: dict[str, float] = {}
        self._stopping: dict[str, float] = {}
        self._tasks = TaskSet()
        self.queue = KeyedQueue()

    async def run(self) -> None:
        """Until cancelled."""
        vmis = ListWatch(self._kube, VMIS)
        pods = ListWatch(
            self._kube,
            PODS,
            labels=f"{names.LAUNCHER_LABEL}={names.LAUNCHER_LABEL_VALUE}",
            fields=f"spec.nodeName={self._node}",
        )

        def vmi_changed(old: Object | None, new: Object | None) -> None:
            item = new or old
            if item is not None and self._concerns(item):
                self.queue.add(object_key(item))

        def pod_changed(old: Object | None, new: Object | None) -> None:
            item = new or old
            reference = kinds.owner(item, "VirtualMachineInstance") if item is not None else None
            if item is not None and reference is not None:
                self.queue.add(f"{item['metadata']['namespace']}/{reference['name']}")

        vmis.add_handler(vmi_changed)
        pods.add_handler(pod_changed)
        try:
            async with TaskScope() as scope:
                scope.service(vmis.run(), "watch instances")
                scope.service(pods.run(), "watch pods")
                await vmis.synced.wait()
                await pods.synced.wait()
                await self._mark_node()
                scope.service(
                    work(self.queue, self.reconcile, workers=8, kind="vmi", expected=(KubeError, QemuError)),
                    "instances",
                )
                await asyncio.Event().wait()
        finally:
            await self._tasks.close()
            for domain in self._domains.values():
                domain.close()

    def _concerns(self, vmi: Object) -> bool:
        state = kinds.migration_state(vmi)
        return self._node in (
            (vmi.get("status") or {}).get("nodeName"),
            state.get("targetNode"),
            state.get("sourceNode"),
            kinds.labels(vmi).get(kinds.TARGET_NODE_LABEL),
        )

    async def _mark_node(self) -> None:
        """Tell the scheduler that machines may come; kubelet may not have made the node yet."""
        while True:
            try:
                await self._kube.patch(NODES, self._node, {"metadata": {"labels": {kinds.SCHEDULABLE_LABEL: "true"}}})
                return
            except KubeError as error:
                log.info("node %s: %s", self._node, error)
                await asyncio.sleep(_AGAIN)

    # One instance

    async def reconcile(self, key: str) -> float | None:
        """Raises KubeError, QemuError; safe to repeat."""
        namespace, _, name = key.partition("/")
        try:
            vmi = await self._kube.get(VMIS, name, namespace)
        except NotFound:
            return None
        selector = pods_selector(vmi["metadata"]["uid"])
        pods = list((await self._kube.list(PODS, namespace, labels=selector)).items)
        self._forget(vmi, pods)
        status = vmi.get("status") or {}
        state = kinds.migration_state(vmi)
        again = None
        if state.get("sourceNode") == self._node and state.get("completed") and not state.get("failed"):
            await self._clean_up_source(key, vmi, pods)
        if state.get("targetNode") == self._node:
            again = await self._target(key, vmi, pods)
        if status.get("nodeName") == self._node and kinds.phase(vmi) in ("Scheduled", "Running"):
            here = await self._here(key, vmi, pods)
            again = here if again is None else min(again, here) if here is not None else again
        return again

    def _forget(self, vmi: Object, pods: list[Object]) -> None:
        """Connections to QEMUs of this instance's pods that are gone."""
        present = {pod["metadata"]["uid"] for pod in pods if kinds.pod_alive(pod)}
        ours = {pod["metadata"]["uid"] for pod in pods}
        for uid in [uid for uid, domain in self._domains.items() if domain.gone and uid in ours - present]:
            self._domains.pop(uid).close()

    async def _domain(self, key: str, pod: Object) -> Domain | None:
        """The QEMU of a pod; None while it does not answer yet."""
        uid = pod["metadata"]["uid"]
        if uid not in self._domains:
            try:
                self._domains[uid] = await Domain.open(pod, lambda: self.queue.add(key), CONNECT_SECONDS)
            except QemuError:
                return None
        return self._domains[uid]

    async def _here(self, key: str, vmi: Object, pods: list[Object]) -> float | None:
        pod = current_pod(vmi, pods)
        if pod is None:
            return None  # virt-controller's business
        uid = pod["metadata"]["uid"]
        domain = self._domains.get(uid)
        if not kinds.pod_alive(pod) or (domain is not None and domain.gone):
            return await self._ended(vmi, pod, domain)
        domain = await self._domain(key, pod)
        if domain is None:
            return _AGAIN
        if kinds.deleting(vmi):
            return await self._stop(vmi, domain)
        if kinds.phase(vmi) == "Scheduled":
            return await self._started(vmi, domain)
        state = kinds.migration_state(vmi)
        if state.get("sourceNode") == self._node and "endTimestamp" not in state:
            self._send_away(key, vmi, domain)
        await self._follow_pause(vmi, domain)
        return await self._ask_guest(vmi, domain)

    async def _started(self, vmi: Object, domain: Domain) -> float | None:
        """From Scheduled to Running, in the two writes of the real one."""
        if not kinds.is_true(vmi, "LiveMigratable"):

            def migratable(item: Object) -> None:
                status = item["status"]
                for kind in ("LiveMigratable", "StorageLiveMigratable"):
                    condition = {"type": kind, "status": "True", "lastProbeTime": None, "lastTransitionTime": None}
                    status["conditions"] = kinds.with_condition(status.get("conditions") or [], condition)
                status["migrationMethod"] = "BlockMigration"
                status["selinuxContext"] = "none"

            vmi = await self._change(vmi, migratable)
        if await domain.status() != "running":
            return _AGAIN
        macs = await domain.network_cards()

        def running(item: Object) -> None:
            status = item["status"]
            kinds.set_phase(item, "Running")
            status["machine"] = {"type": qemu.MACHINE}
            status.setdefault("memory", {})["guestCurrent"] = f"{octets(memory_of(item)) // 1024}Ki"
            for card, entry in _cards(item):
                entry |= {"infoSource": "domain", "linkState": "up", "mac": macs.get(card, ""), "queueCount": 1}

        vmi = await self._change(vmi, running)
        await self._recorder.event(vmi, "Started", "VirtualMachineInstance started.")
        return 0.0

    async def _ask_guest(self, vmi: Object, domain: Domain) -> float | None:
        """Addresses and operating system, from the guest's agent."""
        uid = vmi["metadata"]["uid"]
        left = self._ask_agent_at.get(uid, 0) - time.monotonic()
        if left > 0:
            return left
        if kinds.migrating(vmi) or domain.paused:
            return _AGENT_FAST
        facts = await domain.guest_facts()
        settled = facts is not None and (
            all(len({":" in address for address in facts.of(card)[1]}) == 2 for card, _ in _cards(vmi))
            or _running_long(vmi)
        )
        period = _AGENT_SLOW if settled else _AGENT_FAST
        self._ask_agent_at[uid] = time.monotonic() + period
        if facts is None:
            return period

        def connected(item: Object) -> None:
            status = item["status"]
            old = kinds.condition(item, "AgentConnected")
            if old is None or old.get("status") != "True":
                condition = {
                    "type": "AgentConnected",
                    "status": "True",
                    "lastProbeTime": kinds.now(),
                    "lastTransitionTime": None,
                }
                status["conditions"] = kinds.with_condition(status.get("conditions") or [], condition)
            status["guestOSInfo"] = dict(facts.os)
            for card, entry in _cards(item):
                interface, addresses = facts.of(card)
                entry |= {"infoSource": "domain, guest-agent", "interfaceName": interface}
                if addresses:
                    entry |= {"ipAddress": addresses[0], "ipAddresses": list(addresses)}

        await self._change(vmi, connected)
        return period

    async def _follow_pause(self, vmi: Object, domain: Domain) -> None:
        """The condition Paused follows QEMU's own state, but for the pause of a migration."""
        if kinds.migrating(vmi):
            return
        domain.paused = await domain.status() == "paused"
        if domain.paused == kinds.is_true(vmi, "Paused"):
            return

        def paused(item: Object) -> None:
            status = item["status"]
            others = [entry for entry in status.get("conditions") or [] if entry["type"] != "Paused"]
            if domain.paused:
                stamp = kinds.now()
                others.append(
                    {
                        "type": "Paused",
                        "status": "True",
                        "reason": "PausedByUser",
                        "message": "VMI was paused by user",
                        "lastProbeTime": stamp,
                        "lastTransitionTime": stamp,
                    }
                )
            status["conditions"] = others

        await self._change(vmi, paused)

    async def _stop(self, vmi: Object, domain: Domain) -> float | None:
        """The instance is deleted: press the power button, and after the grace period pull the plug."""
        uid = vmi["metadata"]["uid"]
        grace = float(vmi["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS))
        since = self._stopping.setdefault(uid, time.monotonic())
        domain.shut_down = True
        if time.monotonic() - since >= grace or await domain.status() != "running":
            await domain.quit()
            return _AGAIN
        await domain.monitor.execute("system_powerdown")
        # Again after a second: a guest that is still booting does not hear the first one.
        return min(1.0, grace)

    async def _ended(self, vmi: Object, pod: Object, domain: Domain | None) -> float | None:
        """QEMU is gone and was not migrated away: the instance has ended, well or badly."""
        state = kinds.migration_state(vmi)
        if kinds.migrating(vmi) and state.get("sourceNode") == self._node:
            sent = self._sending.get(str(state.get("migrationUid")))
            if sent is not None and not kinds.deleting(vmi) and domain is not None and domain.shut_down:
                return _AGAIN  # sent away; the target will say so
        well = (
            kinds.deleting(vmi)
            or kinds.deleting(pod)
            or (domain is not None and domain.shut_down)
            or kinds.phase(pod) == "Succeeded"
        )

        def over(item: Object) -> None:
            kinds.set_phase(item, "Succeeded" if well else "Failed")

        vmi = await self._change(vmi, over)
        if not kinds.deleting(vmi):
            reason, message = (
                ("Stopped", "The VirtualMachineInstance was shut down.")
                if well
                else ("Stopped", "The VirtualMachineInstance crashed.")
            )
            await self._recorder.event(vmi, reason, message, "Normal" if well else "Warning")
        self._stopping.pop(vmi["metadata"]["uid"], None)
        self._ask_agent_at.pop(vmi["metadata"]["uid"], None)
        return None

    # Migration: the source

    def _send_away(self, key: str, vmi: Object, domain: Domain) -> None:
        state = kinds.migration_state(vmi)
        uid = str(state.get("migrationUid"))
        if uid in self._sending:
            if state.get("abortRequested") and not state.get("abortStatus"):
                self._tasks.start(self._cancel(domain), f"cancel migration {uid}")
            return
        if not state.get("targetNodeAddress"):
            return
        self._sending[uid] = domain
        self._tasks.start(self._send(key, vmi, domain, uid), f"send {key}")

    @staticmethod
    async def _cancel(domain: Domain) -> None:
        with suppress(QemuError):
            await domain.monitor.execute("migrate_cancel")

    async def _send(self, key: str, vmi: Object, domain: Domain, uid: str) -> None:
        state = kinds.migration_state(vmi)
        settings = settings_of(state)
        since = len(domain.monitor.events)
        failure = ""
        try:
            if state.get("startTimestamp"):
                # A predecessor of this process started it; QEMU went on without it.
                outcome = await self._outcome(domain)
            else:
                vmi = await self._begin(vmi, domain, uid, settings)
                outcome = await self._follow(vmi, domain, uid, settings, since)
            if outcome != "completed":
                failure = await qemu.failure(domain.monitor)
        except (QemuError, OSError, TimeoutError) as error:
            failure = str(error) or "timed out"
        except _Overtaken:
            return
        if failure:
            await self._sending_failed(vmi, uid, failure, domain)
            return
        stops = [event for event in domain.monitor.events[since:] if event.name == "STOP"]
        if stops:
            domain.note_pause(stops[-1])
        await self._until_taken_over(vmi, uid)
        await domain.quit()
        self.queue.add(key)

    async def _begin(self, vmi: Object, domain: Domain, uid: str, settings: Settings) -> Object:
        """Connect to the target's node and give QEMU the connection. Raises QemuError, OSError, TimeoutError."""
        state = kinds.migration_state(vmi)
        with await _dial(str(state["targetNodeAddress"]), state["targetDirectMigrationNodePorts"]) as connection:

            def begun(item: Object) -> None:
                own = _own(item, uid)
                own["startTimestamp"] = kinds.now()
                own["mode"] = "PreCopy"

            vmi = await self._change(vmi, begun)
            await self._recorder.event(vmi, "Migrating", "VirtualMachineInstance is migrating.")
            await qemu.send(domain.monitor, connection, settings)
        return vmi

    @staticmethod
    async def _outcome(domain: Domain) -> str:
        """The state a migration ends in whose beginning this process did not see. Raises QemuError."""
        while (status := await qemu.migration_status(domain.monitor)) not in qemu.ENDED:
            if not status:
                return "failed"  # it was never given to QEMU
            await asyncio.sleep(_AGAIN)
        return status

    async def _follow(self, vmi: Object, domain: Domain, uid: str, settings: Settings, since: int) -> str:
        """Wait for the end; with post-copy, change over when pre-copy takes longer than the policy allows."""
        configuration = kinds.migration_state(vmi).get("migrationConfiguration") or {}
        gibibytes = max(octets(memory_of(vmi)) / 2**30, 0.001)
        limit = float(configuration.get("completionTimeoutPerGiB", 150)) * gibibytes
        started = time.monotonic()
        most = int(configuration.get("maxDowntimeMs") or settings.downtime_ms)
        downtime = settings.downtime_ms
        while downtime < most and (left := limit - (time.monotonic() - started)) > 0:
            with suppress(_Unfinished):
                return await self._finished(domain, min(left, _AIM_SECONDS), since)
            downtime = min(2 * downtime, most)
            await qemu.allow_downtime(domain.monitor, downtime)
        left = limit - (time.monotonic() - started)
        if not settings.post_copy:
            # The real one also gives up a migration that gets nowhere; a small guest gets a fair minimum.
            try:
                return await self._finished(domain, max(left, 30.0), since)
            except _Unfinished:
                await self._cancel(domain)
                return await qemu.finished(domain.monitor, 30, since)
        try:
            return await self._finished(domain, max(left, 0.01), since)
        except _Unfinished:

            def post_copy(item: Object) -> None:
                _own(item, uid)["mode"] = "PostCopy"

            await self._change(vmi, post_copy)
            await domain.monitor.execute("migrate-start-postcopy")
            return await qemu.finished(domain.monitor, 120, since)

    @staticmethod
    async def _finished(domain: Domain, timeout: float, since: int) -> str:
        """The state the migration ends in. Raises _Unfinished at the timeout, QemuError when QEMU ends."""
        try:
            return await qemu.finished(domain.monitor, timeout, since)
        except QemuError as error:
            if domain.gone:
                raise
            raise _Unfinished(str(error)) from None

    async def _sending_failed(self, vmi: Object, uid: str, failure: str, domain: Domain) -> None:
        aborted = post_copy = False

        def failed(item: Object) -> None:
            nonlocal aborted, post_copy
            own = _own(item, uid)
            post_copy = own.get("mode") == "PostCopy"
            if own.get("completed"):
                raise _Overtaken
            aborted = bool(own.get("abortRequested"))
            own.setdefault("startTimestamp", kinds.now())
            own |= {"failed": True, "completed": True, "endTimestamp": kinds.now()}
            own["failureReason"] = "Live migration has been aborted" if aborted else f"Live migration failed {failure}"
            if aborted:
                own["abortStatus"] = "Succeeded"

        try:
            vmi = await self._change(vmi, failed)
        except _Overtaken:
            if not post_copy:
                return
        if post_copy:
            # Part of its memory is lost with the target: neither side can go on.
            await self._change(vmi, lambda item: kinds.set_phase(item, "Failed"))
            await domain.quit()
        reason = kinds.migration_state(vmi).get("failureReason", failure)
        if aborted:
            await self._recorder.event(vmi, "Migrating", "VirtualMachineInstance is aborting migration.")
        message = f"VirtualMachineInstance migration uid {uid} failed. reason:{reason}"
        await self._recorder.event(vmi, "Migrated", message, "Warning")

    async def _until_taken_over(self, vmi: Object, uid: str) -> None:
        metadata = vmi["metadata"]
        with suppress(TimeoutError, KubeError):
            async with asyncio.timeout(_HAND_OVER_SECONDS):
                while True:
                    now = await self._kube.get(VMIS, metadata["name"], metadata["namespace"])
                    state = kinds.migration_state(now)
                    if state.get("migrationUid") != uid or state.get("completed"):
                        return
                    await asyncio.sleep(0.05)

    async def _clean_up_source(self, key: str, vmi: Object, pods: list[Object]) -> None:
        """A QEMU that has sent its guest away ends, also when the virt-handler that sent it is gone."""
        state = kinds.migration_state(vmi)
        pod = next((item for item in pods if item["metadata"]["name"] == state.get("sourcePod")), None)
        if pod is None or not kinds.pod_alive(pod) or (vmi.get("status") or {}).get("nodeName") == self._node:
            return
        domain = await self._domain(key, pod)
        if domain is not None and not domain.gone and await domain.status() == "postmigrate":
            await domain.quit()

    # Migration: the target

    async def _target(self, key: str, vmi: Object, pods: list[Object]) -> float | None:
        state = kinds.migration_state(vmi)
        uid = str(state.get("migrationUid"))
        pod = next((item for item in pods if item["metadata"]["name"] == state.get("targetPod")), None)
        if state.get("completed"):
            return await self._clean_up(key, vmi, pod)
        if uid in self._receiving or pod is None or not kinds.pod_alive(pod):
            return None
        domain = await self._domain(key, pod)
        if domain is None:
            return _AGAIN
        self._receiving[uid] = domain
        self._tasks.start(self._receive(key, vmi, domain, uid, pods), f"receive {key}")
        return None

    async def _clean_up(self, key: str, vmi: Object, pod: Object | None) -> float | None:
        state = kinds.migration_state(vmi)
        if state.get("failed") and pod is not None and kinds.pod_alive(pod):
            domain = await self._domain(key, pod)
            if domain is not None:
                await domain.quit()
        if kinds.TARGET_NODE_LABEL not in kinds.labels(vmi):
            return None

        def unlabel(item: Object) -> None:
            item["metadata"].get("labels", {}).pop(kinds.TARGET_NODE_LABEL, None)

        await self._change(vmi, unlabel)
        return None

    async def _receive(self, key: str, vmi: Object, domain: Domain, uid: str, pods: list[Object]) -> None:
        try:
            await self._receive_guest(vmi, domain, uid, pods)
        except (QemuError, OSError, TimeoutError) as error:
            # The source sees its connection break and reports the failure.
            log.warning("%s does not arrive: %s", key, error or "timed out")
            await domain.quit()
        except _Overtaken:
            log.info("%s: another migration took over", key)
        self.queue.add(key)

    async def _receive_guest(self, vmi: Object, domain: Domain, uid: str, pods: list[Object]) -> None:
        state = kinds.migration_state(vmi)
        since = len(domain.monitor.events)
        if not state.get("startTimestamp"):
            vmi = await self._accept(vmi, domain, uid)

        def detected(item: Object) -> None:
            _own(item, uid)["targetNodeDomainDetected"] = True

        vmi = await self._change(vmi, detected)
        resumed = await self._arrived(domain, since)

        def ready(item: Object) -> None:
            _own(item, uid).setdefault("targetNodeDomainReadyTimestamp", kinds.now())

        vmi = await self._change(vmi, ready)
        await self._complete(domain, since)

        def moved(item: Object) -> None:
            own = _own(item, uid)
            own["endTimestamp"] = kinds.now()
            item["metadata"].setdefault("labels", {})[kinds.NODE_NAME_LABEL] = self._node
            item["status"]["nodeName"] = self._node
            item["status"].pop("launcherContainerImageVersion", None)

        vmi = await self._change(vmi, moved)
        await self._recorder.event(vmi, "Migrated", f"The VirtualMachineInstance migrated to node {self._node}.")
        source = next((pod for pod in pods if pod["metadata"]["name"] == state.get("sourcePod")), None)
        # Only now does the source's own word count: its virt-handler has seen the end of the stream.
        stopped = await domains.read_pause(source["metadata"]["uid"]) if source is not None else None

        def completed(item: Object) -> None:
            _own(item, uid)["completed"] = True
            noted = item["metadata"].setdefault("annotations", {})
            noted.pop(kinds.PAUSE_ANNOTATION, None)
            noted.pop(kinds.STOPPED_ANNOTATION, None)
            if stopped is not None and resumed is not None:
                noted[kinds.STOPPED_ANNOTATION] = f"{stopped:.6f}"
                noted[kinds.PAUSE_ANNOTATION] = f"{(resumed - stopped) * 1000:.3f}"

        await self._change(vmi, completed)

    async def _accept(self, vmi: Object, domain: Domain, uid: str) -> Object:
        """Let the source's node connect, and QEMU read from there. Raises QemuError, OSError, TimeoutError."""
        settings = settings_of(kinds.migration_state(vmi))
        with _listen(self._addresses) as (listener, address, port):

            def listening(item: Object) -> None:
                own = _own(item, uid)
                own["targetNodeAddress"] = address
                own["targetDirectMigrationNodePorts"] = {str(port): 0}

            vmi = await self._change(vmi, listening)
            message = f"Migration Target is listening at {address}, on ports: {port}"
            await self._recorder.event(vmi, "PreparingTarget", "VirtualMachineInstance Migration Target Prepared.")
            await self._recorder.event(vmi, "PreparingTarget", message)
            async with asyncio.timeout(_ACCEPT_SECONDS):
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        with connection:
            await qemu.receive(domain.monitor, connection, settings)
        return vmi

    @staticmethod
    async def _arrived(domain: Domain, since: int) -> float | None:
        """When the guest went on here, by QEMU's clock; None if that was before we looked. Raises QemuError."""
        if await domain.status() == "running":
            heard = [event.time for event in domain.monitor.events[since:] if event.name == "RESUME"]
            return heard[0] if heard else None
        event = await domain.monitor.wait_for(
            lambda event: event.name == "RESUME" or qemu.is_migration(event, "failed"), 300, since
        )
        if event.name != "RESUME":
            raise QemuError("the migration failed")
        return event.time

    @staticmethod
    async def _complete(domain: Domain, since: int) -> None:
        """Wait until all of the guest's memory is here. Raises QemuError when it does not come."""
        if await qemu.migration_status(domain.monitor) == "completed":
            return
        outcome = await qemu.finished(domain.monitor, 300, since)
        if outcome != "completed":
            raise QemuError(f"the migration ended as {outcome}")

    # Writing

    async def _change(self, vmi: Object, change: Change) -> Object:
        """Read, change, write the whole object, until nobody else wrote in between. Raises KubeError."""
        metadata = vmi["metadata"]
        while True:
            current = await self._kube.get(VMIS, metadata["name"], metadata["namespace"])
            if current["metadata"]["uid"] != metadata["uid"]:
                raise _Overtaken
            wanted = copy.deepcopy(current)
            change(wanted)
            if wanted == current:
                return current
            try:
                return await self._kube.replace(VMIS, wanted)
            except Conflict:
                await asyncio.sleep(0.01)


class _Unfinished(Exception):
    """The migration goes on for longer than was waited."""


class _Overtaken(KubeError):
    """The instance, or its migration, is no longer the one that was worked on."""

    def __init__(self) -> None:
        super().__init__("overtaken by another instance or migration")


def _cards(vmi: Object) -> list[tuple[int, Object]]:
    """The instance's ``status.interfaces``, each with the number of the guest's card: their order in the spec."""
    devices = (vmi["spec"].get("domain") or {}).get("devices") or {}
    order = [item["name"] for item in devices.get("interfaces") or []]
    found = (vmi.get("status") or {}).get("interfaces") or []
    return [(order.index(item["name"]) if item["name"] in order else number, item) for number, item in enumerate(found)]


def _running_long(vmi: Object) -> bool:
    times = {
        entry["phase"]: entry["phaseTransitionTimestamp"]
        for entry in (vmi.get("status") or {}).get("phaseTransitionTimestamps") or []
    }
    since = times.get("Running")
    return since is not None and (datetime.now(UTC) - decode_time(since)).total_seconds() > _SETTLED_SECONDS


def _own(item: Object, uid: str) -> dict[str, Any]:
    """The migrationState, if it is still about this migration."""
    state = item["status"].get("migrationState")
    if not isinstance(state, dict) or state.get("migrationUid") != uid:
        raise _Overtaken
    return state


def settings_of(state: Any) -> Settings:
    """QEMU's settings from a ``migrationState``."""
    configuration = state.get("migrationConfiguration") or {}
    return Settings(
        post_copy=bool(configuration.get("allowPostCopy")),
        downtime_ms=min(DOWNTIME_AIM_MS, int(configuration.get("maxDowntimeMs") or DOWNTIME_AIM_MS)),
        bandwidth=octets(str(configuration.get("bandwidthPerMigration") or "0")),
        auto_converge=bool(configuration.get("allowAutoConverge")),
    )


async def _dial(address: str, ports: dict[str, int]) -> socket.socket:
    """Connect to a target's node. Raises OSError, TimeoutError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(10):
            port = next(int(port) for port, kind in ports.items() if kind == 0)
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except BaseException:
        connection.close()
        raise
    # QEMU reads and writes it from threads of its own.
    connection.setblocking(True)
    return connection


class _listen:
    """A listening socket on the node's network: (socket, address, port). Raises OSError."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._addresses = addresses
        self._socket: socket.socket | None = None

    def __enter__(self) -> tuple[socket.socket, str, int]:
        address = self._addresses[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind((address, 0))
        self._socket.listen(1)
        return self._socket, address, self._socket.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()


async def node_addresses(kube: Kube, node: str) -> tuple[str, ...]:
    """The node's InternalIPs, waited for until kubelet has written them."""
    while True:
        with suppress(KubeError):
            item = await kube.get(NODES, node)
            found = [
                entry["address"]
                for entry in item.get("status", {}).get("addresses") or []
                if entry.get("type") == "InternalIP"
            ]
            if found:
                return tuple(found)
        await asyncio.sleep(_AGAIN)
