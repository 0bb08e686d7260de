"""Why an address could not be given."""

from enum import StrEnum


class ConflictKind(StrEnum):
    """What is taken."""

    IP = "ip"
    MAC = "mac"


class AllocationError(Exception):
    """Base of all reasons."""


class Exhausted(AllocationError):
    """No free address is left. Retryable: succeeds once an address is released."""


class AddressConflict(AllocationError):
    """An address or MAC belongs to somebody else. Retryable: succeeds once ``owner`` lets go."""

    def __init__(self, kind: ConflictKind, value: str, owner: str) -> None:
        super().__init__(f"{'address' if kind is ConflictKind.IP else 'MAC address'} {value} is in use by {owner}")
        self.kind = kind
        self.value = value
        self.owner = owner


class Immovable(AllocationError):
    """The owner's addresses are bound to a node that it would leave. Retryable: succeeds once they are given back."""


class OutOfRange(AllocationError):
    """The address lies outside the subnet, or in a part of it that workloads never get. Terminal for that request."""


class WrongFamily(AllocationError):
    """The addresses asked for are not one of each family of the network. Terminal for that request."""
