"""Conditions of a status (``metav1.Condition``). Pure."""

from collections.abc import Iterable
from datetime import datetime

from vmnet.kube.api import Object
from vmnet.kube.codec import encode_time


def find_condition(conditions: Iterable[Object] | None, type: str) -> Object | None:
    """The condition of that type, if any."""
    return next((item for item in conditions or () if item.get("type") == type), None)


def set_condition(
    conditions: Iterable[Object] | None,
    type: str,
    status: bool | str,
    reason: str,
    message: str,
    *,
    generation: int | None = None,
    now: datetime,
) -> tuple[list[Object], bool]:
    """The list with this condition set, and whether anything changed.

    ``status``: a bool, or ``"Unknown"``. ``lastTransitionTime`` moves only when the status does; other conditions and
    the order stay.
    """
    word = str(status) if isinstance(status, bool) else status
    found = [dict(item) for item in conditions or ()]
    wanted: Object = {"type": type, "status": word, "reason": reason, "message": message}
    if generation is not None:
        wanted["observedGeneration"] = generation
    for index, item in enumerate(found):
        if item.get("type") != type:
            continue
        same = item.get("status") == word and "lastTransitionTime" in item
        wanted["lastTransitionTime"] = item["lastTransitionTime"] if same else encode_time(now)
        found[index] = wanted
        return found, item != wanted
    return [*found, wanted | {"lastTransitionTime": encode_time(now)}], True
