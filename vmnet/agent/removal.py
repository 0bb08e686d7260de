"""Takes the datapath off a node whose agent has ended: namespaces, links, tables, files. The node's pods lose it."""

import asyncio
import shutil
from pathlib import Path
from typing import Final

from vmnet.cni.call import DELETED_DIRECTORY
from vmnet.kernel.api import Kernel
from vmnet.model import names
from vmnet.model.configuration import BY_PATH
from vmnet.model.names import NetworkId
from vmnet.model.removal import Removal
from vmnet.plan import firewall, ops, table
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan.state import NetworkState, NodeState

_FILES: Final = (
    Path(names.CNI_SOCKET).name,
    BY_PATH["dns.socket"].default.name,
    Path(DELETED_DIRECTORY).name,
)
_MOST_NAMED: Final = 10


async def remove_datapath(kernel: Kernel, directory: Path, *, with_ports: bool = False) -> tuple[Removal, list[str]]:
    """Networks that pods are attached to stay, and the tables that guard them, unless ``with_ports``.

    ``directory``: where agents have their sockets and notes. Nobody may serve there. Returns also the namespaces of the
    networks that pods were attached to. Raises KernelError.
    """
    done, left, attached, cut = list[str](), list[str](), list[str](), 0
    for namespace in sorted((await kernel.observe_node()).namespaces):
        observed = await kernel.observe_network(namespace)
        ports = observed.ports() if observed is not None else ()
        attached += [namespace] if ports else []
        if ports and not with_ports:
            left.append(f"{namespace} stays: {len(ports)} interfaces of pods are attached, of {_containers(observed)}")
            continue
        await kernel.apply(network_plan.remove(NetworkId(int(namespace.removeprefix("vmnet-")))))
        done.append(f"network namespace {namespace} is removed")
        cut += len(ports)
    if left:
        left.append("the node's tables stay while networks do: drain the node, or delete these pods, and try again")
        return Removal(tuple(done), tuple(left)), attached
    done += await _remove_from_node(kernel)
    done += await asyncio.to_thread(_remove_files, directory)
    kept = []
    if cut:
        kept.append(f"pods of {cut} interfaces have no network of their own now, nor a default route: make them anew")
    if done:
        switched = ", ".join(key.replace("/", ".") for key, _ in node_plan.SYSCTLS)
        kept.append(f"{switched} stay on: others may have come to need them")
    left = [f"{found} is still there" for found in await _remains(kernel)]
    return Removal(tuple(done), tuple(left), tuple(kept)), attached


async def _remove_from_node(kernel: Kernel) -> list[str]:
    state, found, done = await kernel.observe_node(), list[ops.Op](), []
    for link in sorted(filter(_is_ours, state.links)):
        found.append(ops.DeleteLink(None, link))
        done.append(f"device {link} is removed")
    tables = sorted(state.tables)
    if state.sets or state.prepared:
        tables.append(firewall.NODE_TABLE)
    for identity in tables:
        found.append(ops.LoadFirewall(None, table.removal(identity)))
        done.append(f"table {identity} is removed")
    await kernel.apply(found)
    return done


async def _remains(kernel: Kernel) -> list[str]:
    """What somebody has made again meanwhile, or the kernel does not let go."""
    state: NodeState = await kernel.observe_node()
    found = [f"network namespace {namespace}" for namespace in sorted(state.namespaces)]
    found += [f"device {link}" for link in sorted(filter(_is_ours, state.links))]
    found += [f"table {identity}" for identity in sorted(state.tables)]
    return [*found, f"table {firewall.NODE_TABLE}"] if state.prepared else found


def _is_ours(link: str) -> bool:
    prefix = next((known for known in (names.JOIN_PREFIX, names.LOCALNET_PREFIX) if link.startswith(known)), None)
    return prefix is not None and link.removeprefix(prefix).isdecimal()


def _remove_files(directory: Path) -> list[str]:
    """What agents and the plugin make there, by name; the directory may be a mount of the agent's pod."""
    done = []
    for path in (directory / name for name in _FILES):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        else:
            continue
        done.append(f"{path} is removed")
    return done


def _containers(observed: NetworkState | None) -> str:
    owners = sorted({network_plan.owner_of(link)[0][:12] for link in observed.ports()} if observed else ())
    more = f" and {len(owners) - _MOST_NAMED} more" if len(owners) > _MOST_NAMED else ""
    return "containers " + ", ".join(owners[:_MOST_NAMED]) + more
