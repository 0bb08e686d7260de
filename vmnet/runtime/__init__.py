"""Queues, back-off and task scopes: what every long-running process here is made of. Standard library only."""
