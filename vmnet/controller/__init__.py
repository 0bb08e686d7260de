"""The controller: networks, allocations, claims and migration records. One reconciler per kind."""
