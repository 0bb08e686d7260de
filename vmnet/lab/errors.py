"""What goes wrong in the lab, in words for the person who typed the command."""


class LabError(Exception):
    """``str`` names the object and what happened; ``next_step`` what to do about it (empty when there is nothing)."""

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.next_step = next_step
