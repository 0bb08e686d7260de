"""CNI errors: the codes of the CNI specification 1.1 (section 5, "Error") and their JSON."""

import json
from enum import IntEnum


class Code(IntEnum):
    """Error codes; 1–99 belong to the specification, 100 and above to the plugin."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODING_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50
    """STATUS: no ADD can be served now."""
    LIMITED_CONNECTIVITY = 51
    """STATUS: no ADD can be served, and existing containers may have limited connectivity."""
    INTERNAL = 100
    CHECK_FAILED = 101
    """CHECK: the container's network is not what ADD made."""


class CniError(Exception):
    """A request failed. ``message`` is short and names the object; ``details`` is longer text for the log."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def to_json(self, version: str = "1.1.0") -> bytes:
        """What the plugin prints before it exits with status 1."""
        body: dict[str, object] = {"cniVersion": version, "code": int(self.code), "msg": self.message}
        if self.details:
            body["details"] = self.details
        return json.dumps(body).encode()
