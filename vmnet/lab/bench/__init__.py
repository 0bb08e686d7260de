"""Benchmarks: every figure is a ratio to a bare counterpart, measured in turn with it in the same run."""
