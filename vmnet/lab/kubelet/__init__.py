"""The lab's kubelet: one node's pods as processes in namespaces of their own."""
