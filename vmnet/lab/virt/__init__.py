"""The lab's virt component: KubeVirt's published API in front of real QEMU guests."""
