"""virt-controller's role: watches, queues and their workers."""

import asyncio
from collections.abc import Callable
from typing import Final

from vmnet.kube.api import PODS, VMIMS, VMIS, VMS, Kube, KubeError, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.kube.watch import ListWatch
from vmnet.lab.virt import kinds
from vmnet.lab.virt.instances import Instances
from vmnet.lab.virt.machines import Machines
from vmnet.lab.virt.migrations import Migrations
from vmnet.model import names
from vmnet.runtime.queue import work
from vmnet.runtime.tasks import TaskScope

COMPONENT: Final = "virtualmachine-controller"
"""What the real one calls itself in events."""


async def run(kube: Kube) -> None:
    """Reconcile machines, instances and migrations until cancelled."""
    recorder = Recorder(kube, COMPONENT)
    machines, instances, migrations = Machines(kube, recorder), Instances(kube, recorder), Migrations(kube, recorder)
    vms, vmis, vmims = (ListWatch(kube, resource) for resource in (VMS, VMIS, VMIMS))
    pods = ListWatch(kube, PODS, labels=f"{names.LAUNCHER_LABEL}={names.LAUNCHER_LABEL_VALUE}")

    def vmi_changed(vmi: Object) -> None:
        instances.queue.add(object_key(vmi))
        machines.queue.add(object_key(vmi))
        for job in vmims.items():
            if job["spec"].get("vmiName") == vmi["metadata"]["name"] and (
                job["metadata"]["namespace"] == vmi["metadata"]["namespace"]
            ):
                migrations.queue.add(object_key(job))

    def pod_changed(pod: Object) -> None:
        namespace = pod["metadata"]["namespace"]
        reference = kinds.owner(pod, "VirtualMachineInstance")
        if reference is not None:
            instances.queue.add(f"{namespace}/{reference['name']}")
        job = kinds.annotations(pod).get(kinds.JOB_NAME_ANNOTATION)
        if job:
            migrations.queue.add(f"{namespace}/{job}")

    _feed(vms, lambda vm: machines.queue.add(object_key(vm)))
    _feed(vmis, vmi_changed)
    _feed(vmims, lambda job: migrations.queue.add(object_key(job)))
    _feed(pods, pod_changed)
    async with TaskScope() as scope:
        for informer, what in ((vms, "machines"), (vmis, "instances"), (vmims, "migrations"), (pods, "pods")):
            scope.service(informer.run(), f"watch {what}")
        async with asyncio.TaskGroup() as group:
            for informer in (vms, vmis, vmims, pods):
                group.create_task(informer.synced.wait())
        expected = (KubeError,)
        scope.service(work(machines.queue, machines.reconcile, kind="vm", expected=expected), "machines")
        scope.service(work(instances.queue, instances.reconcile, kind="vmi", expected=expected), "instances")
        scope.service(work(migrations.queue, migrations.reconcile, kind="vmim", expected=expected), "migrations")
        await asyncio.Event().wait()


def _feed(informer: ListWatch, changed: Callable[[Object], None]) -> None:
    def handler(old: Object | None, new: Object | None) -> None:
        item = new if new is not None else old
        if item is not None:
            changed(item)

    informer.add_handler(handler)
