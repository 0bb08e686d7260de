"""``python -m vmnet.lab.apiserver``: serve until SIGTERM."""

import argparse
import asyncio
import importlib
import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path

from vmnet.lab.apiserver.server import ApiServer


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        ipaddress.ip_address(host)
        return host, int(port)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT") from error


def _account(text: str) -> tuple[str, str, str, Path]:
    account, _, path = text.partition("=")
    qualified, _, node = account.partition("@")
    namespace, _, name = qualified.partition("/")
    if not namespace or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME[@NODE]=PATH")
    return namespace, name, node, Path(path)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m vmnet.lab.apiserver", description=__doc__)
    found.add_argument("--listen", type=_address, action="append", default=[], metavar="ADDRESS:PORT")
    found.add_argument(
        "--inherit-fd", type=int, action="append", default=[], metavar="N", help="a TCP socket that listens already"
    )
    found.add_argument("--certificates", type=Path, required=True, metavar="DIR")
    found.add_argument("--kubeconfig", type=Path, action="append", default=[], metavar="PATH")
    found.add_argument("--kubeconfig-url", metavar="URL", help="how clients of the kubeconfig reach the server")
    found.add_argument("--token-file", type=Path, metavar="PATH")
    found.add_argument(
        "--account",
        type=_account,
        action="append",
        default=[],
        metavar="NAMESPACE/NAME[@NODE]=PATH",
        help="write a kubeconfig for a service account, as if for a pod of it on a node",
    )
    found.add_argument("--audit-log", type=Path, metavar="PATH", help="what clients asked for, each thing once")
    found.add_argument("--service-cidr", default="10.96.0.0/16", metavar="CIDR[,CIDR]")
    found.add_argument("--advertise", metavar="ADDRESS", help="endpoint of the kubernetes Service")
    found.add_argument("--host", action="append", default=[], help="another name in the server's certificate")
    found.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module whose mount(server, kubeconfig) adds a group",
    )
    found.add_argument("--mount-kubeconfig", type=Path, metavar="PATH", help="what mounted groups connect with")
    found.add_argument("--ready-fd", type=int, metavar="N", help="gets one line when requests are answered")
    return found


async def _serve(options: argparse.Namespace) -> None:
    inherited = [socket.socket(fileno=number) for number in options.inherit_fd]
    for found in inherited:
        found.setblocking(False)
    server = ApiServer(
        options.certificates,
        listen=options.listen,
        inherited=inherited,
        service_ranges=options.service_cidr.split(","),
        advertise=options.advertise,
        hosts=options.host,
        token_file=options.token_file,
        audit_log=options.audit_log,
    )
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    for module in options.mount:
        importlib.import_module(module).mount(server, options.mount_kubeconfig)
    async with server:
        for path in options.kubeconfig:
            server.kubeconfig(path, url=options.kubeconfig_url)
        for namespace, name, node, path in options.account:
            server.account_kubeconfig(path, namespace, name, node)
        if options.ready_fd is not None:
            os.write(options.ready_fd, b"ready\n")
            os.close(options.ready_fd)
        await stopping.wait()


def main() -> None:
    """Run the server."""
    found = parser()
    options = found.parse_args()
    if not options.listen and not options.inherit_fd:
        found.error("one of --listen and --inherit-fd is required")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(options))


if __name__ == "__main__":
    main()
