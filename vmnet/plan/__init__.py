"""Desired and observed state in, ordered operations out. Pure."""
