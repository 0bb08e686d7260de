"""Queues, back-off and task scopes. Standard library only; knows neither Kubernetes nor the kernel."""
