"""The embedded Kubernetes-compatible API server of the lab."""
