from pathlib import Path

import pytest

from vmnet.lab.guest.image import GuestImage
from vmnet.lab.virt.qemu import MINIMUM_MEMORY_MIB, Machine, command_line, memory_kib

IMAGE = GuestImage(Path("/vmlinuz"), Path("/initramfs"), "test", "6.1.0")
WORD_KIB = 256
"""64 pages of 4 KiB: what one word of QEMU's dirty bitmap stands for."""


def machine(accelerator: str, memory_mib: int) -> Machine:
    return Machine("blue", Path("/run/blue"), IMAGE, accelerator, memory_mib)


@pytest.mark.parametrize("memory_mib", [1, 96, 128, 129, 1024])
def test_an_emulated_guests_memory_ends_within_a_word_of_the_dirty_bitmap(memory_mib: int) -> None:
    found = memory_kib(machine("tcg", memory_mib))
    assert found % WORD_KIB
    assert found % 8 == 0
    asked = max(memory_mib, MINIMUM_MEMORY_MIB) * 1024
    assert asked < found < asked + WORD_KIB


def test_a_guest_on_kvm_has_what_was_asked_for() -> None:
    assert memory_kib(machine("kvm", 128)) == 128 * 1024


def test_source_and_target_are_started_with_the_same_memory() -> None:
    words = command_line(machine("tcg", 128))
    assert words[words.index("-m") + 1] == f"{128 * 1024 + 8}k"
