"""Composition roots: real parts wired together. Nobody imports this package."""
