"""The Kubernetes seam: the only code that talks to the API server."""
