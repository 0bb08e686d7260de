"""Stand-ins for the controllers of a cluster, used only with the lab's embedded API."""
