"""The one error of every decoder."""


class Malformed(Exception):
    """The bytes are not what their headers promise; the message says where. The packet is counted and dropped."""
