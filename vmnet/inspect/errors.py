"""Why something could not be looked at."""


class InspectionError(Exception):
    """What could not be looked at, and what the administrator can do; ``next_step`` may be empty."""

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.next_step = next_step


class NodeUnreadable(InspectionError):
    """A node's agent could not be asked. ``pod`` is empty where there is none."""

    def __init__(self, node: str, pod: str, reason: str, next_step: str) -> None:
        super().__init__(f"node {node}{f', pod {pod}' if pod else ''}: {reason}", next_step)
        self.node = node
        self.pod = pod
        self.reason = reason
