"""What the controller writes on a Node: its number, and its parts of the Layer3 networks.

The annotations are ``names.NODE_NUMBER_ANNOTATION`` and ``names.NODE_SUBNETS_ANNOTATION``.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Final

from vmnet.model import addresses, names
from vmnet.model.addresses import IPNetwork

MAX_NUMBER: Final = addresses.TRANSIT_IPV4.num_addresses - 2

Parts = tuple[IPNetwork, ...]
"""A node's part of one network: one subnet of each family, and further ones where those were used up."""


def number_of(annotations: Mapping[str, str]) -> int | None:
    """The node's number; None when it has none that can be used."""
    text = annotations.get(names.NODE_NUMBER_ANNOTATION, "")
    return int(text) if text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_NUMBER else None


def parts_of(annotations: Mapping[str, str]) -> dict[str, Parts]:
    """Network name → the node's part. Raises ValueError when the annotation cannot be read."""
    text = annotations.get(names.NODE_SUBNETS_ANNOTATION)
    if not text:
        return {}
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"annotation {names.NODE_SUBNETS_ANNOTATION} is not JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(found, list) for found in entries.values()):
        raise ValueError(f"annotation {names.NODE_SUBNETS_ANNOTATION} is not an object of lists")
    return {str(name): tuple(addresses.network(str(item)) for item in found) for name, found in entries.items()}


def encode_parts(parts: Mapping[str, Iterable[IPNetwork]]) -> str:
    """The text that ``parts_of`` reads."""
    return json.dumps({name: [str(item) for item in found] for name, found in parts.items()}, sort_keys=True)
