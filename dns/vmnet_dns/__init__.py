"""A DNS responder for isolated networks: one view per network, answers from bytes to bytes.

It knows neither Kubernetes nor netlink: names and addresses come in as values, sockets are opened by the caller.
"""
