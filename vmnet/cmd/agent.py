"""``vmnet agent``: owns one node's datapath; one runs on every node."""

import argparse
import asyncio
import logging
import signal

from aiohttp import web

from vmnet import metrics
from vmnet.agent.agent import Agent
from vmnet.agent.cluster import Stores
from vmnet.cmd import sources
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.client import KubeClient
from vmnet.model.configuration import BY_PATH, ConfigurationError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    sources.add_arguments(parser, "shared", "agent", "dns")


async def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT. Nothing is torn down: the next agent adopts the datapath."""
    settled = sources.settle(arguments)
    configuration = settled.configuration
    logging.getLogger().setLevel(configuration.shared.log_level.upper())
    settled.tell("shared", "agent", "dns")
    if configuration.agent.node_name is None:
        option = BY_PATH["agent.nodeName"]
        raise ConfigurationError([f"{option.path} is not set: {option.flag}, or ${' or $'.join(option.variables)}"])
    served = configuration.agent.metrics_address
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kube = await KubeClient.connect(configuration.shared.kubeconfig, user_agent="vmnet-agent")
    kernel = LinuxKernel(configuration.agent.node_mounts)
    try:
        agent = Agent(configuration, kernel, kube, Stores.watching(kube))
        runner = web.AppRunner(metrics.application(agent.not_ready, agent.networks), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, served.host, served.port).start()
            working = asyncio.create_task(agent.run(), name="agent")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            working.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
            try:
                await working
            except asyncio.CancelledError:
                log.info("agent of %s ends; its datapath stays", configuration.agent.node_name)
        finally:
            await runner.cleanup()
        return 0
    finally:
        await kernel.close()
        await kube.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
