"""What the machine refuses before the kernel is asked."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmnet.kernel.api import Gone, KernelError
from vmnet.kernel.linux import LinuxKernel
from vmnet.model.names import InterfaceName


@pytest.fixture
def kernel() -> Iterator[LinuxKernel]:
    found = LinuxKernel()
    yield found
    found._workers.close()
    found._node.close()


@pytest.fixture
def netns(tmp_path: Path) -> str:
    path = tmp_path / "pod"
    path.touch()
    return str(path)


async def test_a_namespace_is_not_gone_because_no_descriptor_is_left(
    kernel: LinuxKernel, netns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.open

    def none_left(path: Any, *arguments: Any, **options: Any) -> int:
        if path == netns:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return before(path, *arguments, **options)

    monkeypatch.setattr(os, "open", none_left)
    with pytest.raises(KernelError, match="Too many open files") as found:
        await kernel.observe_pod(netns, InterfaceName("eth0"))
    assert not isinstance(found.value, Gone)
    assert found.value.errno == errno.EMFILE
