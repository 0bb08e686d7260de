"""The conditions of an object's status, several at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from vmnet.kube.api import Object
from vmnet.kube.conditions import set_condition


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition as it should be."""

    type: str
    status: bool
    reason: str
    message: str


def merged(item: Object, wanted: Iterable[Condition], now: datetime) -> list[Object] | None:
    """The new ``status.conditions``; None when nothing would change. Conditions of other types are kept."""
    conditions = list((item.get("status") or {}).get("conditions") or [])
    generation = item["metadata"].get("generation")
    any_changed = False
    for condition in wanted:
        conditions, changed = set_condition(
            conditions,
            condition.type,
            condition.status,
            condition.reason,
            condition.message,
            generation=generation,
            now=now,
        )
        any_changed |= changed
    return conditions if any_changed else None
