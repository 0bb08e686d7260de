"""User-defined networks for Kubernetes pods and KubeVirt VMs."""
