"""Sections 1 and 2: networks, pods, what they reach, and what nobody reaches."""

from collections.abc import Sequence
from typing import Final

from vmnet.lab.workshop.steps import Exits, Section, Shows, Step, Unreachable, does, in_pod, misses, reaches, waits

_STATEFUL: Final = (("blue", "blue"), ("green", "green"), ("red", "red"), ("yellow", "yellow"), ("default", "default"))
_NETWORKS: Final = r"jsonpath={.metadata.annotations.k8s\.ovn\.org/pod-networks}"
_STATUS: Final = r"jsonpath={.metadata.annotations.k8s\.v1\.cni\.cncf\.io/network-status}"
_OPEN: Final = "k8s.ovn.org/open-default-ports"

SETUP: Final[Sequence[Step]] = (
    does("four namespaces for primary networks", "kubectl apply -f namespaces.yaml", "four namespaces"),
    does("a network for blue, one for green, one for red and yellow", "kubectl apply -f networks.yaml"),
    waits(
        "blue-network is ready", "kubectl wait -n blue udn/blue-network --for=condition=NetworkReady", "condition met"
    ),
    waits(
        "green-network is ready",
        "kubectl wait -n green udn/green-network --for=condition=NetworkReady",
        "condition met",
    ),
    waits(
        "colored-enterprise is ready",
        "kubectl wait cudn/colored-enterprise --for=condition=NetworkReady",
        "condition met",
    ),
    Step(
        "both namespaces have the attachment definition",
        "kubectl get net-attach-def -A",
        "colored-enterprise in red and in yellow",
        Shows(matches=r"(?s)^red +colored-enterprise.*^yellow +colored-enterprise"),
        within=30,
    ),
    does("two replicas in each namespace", "kubectl apply -f pods.yaml", "five stateful sets"),
    *(
        waits(f"{name} runs", f"kubectl rollout status -n {namespace} sts/{name}", "2 new pods are ready")
        for namespace, name in _STATEFUL
    ),
    does("pods beside others on their nodes", "kubectl apply -f neighbours.yaml", "three pods"),
    waits("blue-near runs", "kubectl wait -n blue pod/blue-near --for=condition=Ready", "condition met"),
    waits("green-near runs", "kubectl wait -n green pod/green-near --for=condition=Ready", "condition met"),
    waits("yellow-near runs", "kubectl wait -n yellow pod/yellow-near --for=condition=Ready", "condition met"),
)

ACCESS: Final[Sequence[Step]] = (
    Step(
        "the interfaces of a pod, on a terminal",
        "kubectl exec -n blue -it blue-0 -- ip a",
        "eth0 on the default network, ovn-udn1 with an address of 103.103.0.0/16",
        Shows(("inet <udn:blue/blue-0>/24", "inet <eth0:blue/blue-0>/"), matches=r"(?s)eth0@.*ovn-udn1@"),
    ),
    Step(
        "its routes",
        "kubectl exec -n blue -it blue-0 -- ip r",
        "the default route leaves by ovn-udn1",
        Shows(matches=r"^default via 103\.103\.\d+\.1 dev ovn-udn1", never=("default via 10.244.",)),
    ),
    Step(
        "the interfaces of a pod on a segment",
        "kubectl exec -n red -it red-0 -- ip -br a show dev ovn-udn1",
        "an address of 192.168.0.0/16",
        Shows(("<udn:red/red-0>/16",)),
    ),
    Step(
        "ping across nodes",
        "kubectl exec -n blue -it blue-0 -- ping -c 2 -W 3 <udn:blue/blue-1>",
        "no packet is lost",
        Shows((" 0% packet loss",)),
        within=15,
    ),
    Step(
        "ping on one segment, between namespaces",
        "kubectl exec -n red -it red-0 -- ping -c 2 -W 3 <udn:yellow/yellow-0>",
        "no packet is lost",
        Shows((" 0% packet loss",)),
        within=15,
    ),
    Step(
        "HTTP",
        "kubectl exec -n blue -it blue-0 -- curl -sS --max-time 3 http://<udn:blue/blue-1>:8080/hostname",
        "answers blue-1",
        Shows(("blue-1",)),
        within=15,
    ),
    Step(
        "the other container of the pod",
        in_pod("blue/blue-0", "curl -sS --max-time 3 http://<udn:blue/blue-1>:9090/hostname", "agnhost-container-9090"),
        "answers blue-1",
        Shows(("blue-1",)),
        within=15,
    ),
    Step(
        "an exit code comes back",
        in_pod("blue/blue-0", "sh -c 'exit 7'"),
        "exit status 7",
        Exits(7, "command terminated with exit code 7"),
    ),
    Step(
        "logs",
        "kubectl logs -n blue blue-0 -c agnhost-container-8080 --tail=500",
        "the server's start and kubelet's probes",
        Shows(("GET /healthz",)),
        within=40,
    ),
)

ADDRESSES: Final[Sequence[Step]] = (
    Step(
        "the annotation of a pod",
        f"kubectl get pod -n blue blue-0 -o '{_NETWORKS}'",
        "a primary address and an infrastructure-locked one",
        Shows(
            ('"role": "primary"', '"role": "infrastructure-locked"', "<udn:blue/blue-0>/24", "<eth0:blue/blue-0>/"),
        ),
    ),
    Step(
        "the status of its networks",
        f"kubectl get pod -n blue blue-0 -o '{_STATUS}'",
        "eth0, and ovn-udn1 as the default",
        Shows(('"interface": "eth0"', '"interface": "ovn-udn1"', '"default": true')),
    ),
    Step(
        "status.podIP",
        "kubectl get pod -n blue blue-0 -o jsonpath={.status.podIP}",
        "an address of the default network",
        Shows(matches=r"^10\.244\."),
    ),
    reaches("blue/blue-0", "http://<udn:blue/blue-1>:8080/hostname", "blue-1", "Layer3, across nodes"),
    reaches("blue/blue-0", "http://<udn:blue/blue-near>:8080/hostname", "blue-near", "Layer3, on the same node"),
    reaches("red/red-0", "http://<udn:red/red-1>:8080/hostname", "red-1", "Layer2, across nodes"),
    reaches("red/red-0", "http://<udn:yellow/yellow-near>:8080/hostname", "yellow-near", "Layer2, on the same node"),
    reaches("yellow/yellow-1", "http://<udn:red/red-0>:9090/hostname", "red-0", "Layer2, the other direction"),
    Step(
        "the client's address is its own",
        in_pod("blue/blue-0", "curl -sS --max-time 3 http://<udn:blue/blue-1>:8080/clientip"),
        "blue-0's address on the network",
        Shows(("<udn:blue/blue-0>:",)),
        within=15,
    ),
    misses("blue/blue-0", "http://<udn:green/green-0>:8080/hostname", "blue → green"),
    misses("green/green-0", "http://<udn:blue/blue-0>:8080/hostname", "green → blue"),
    misses("green/green-near", "http://<udn:blue/blue-0>:8080/hostname", "green → blue on the same node"),
    misses("red/red-0", "http://<udn:blue/blue-0>:8080/hostname", "red → blue"),
    misses("blue/blue-0", "http://<udn:red/red-0>:8080/hostname", "blue → red"),
    misses("blue/blue-0", "http://<eth0:green/green-0>:8080/hostname", "blue → green's eth0"),
    misses("green/green-near", "http://<eth0:blue/blue-0>:8080/hostname", "green → blue's eth0 on the same node"),
    misses("blue/blue-0", "http://<eth0:blue/blue-1>:8080/hostname", "blue → blue's own eth0"),
    misses("blue/blue-0", "http://<eth0:default/default-0>:8080/hostname", "blue → a pod of the default network"),
    misses("default/default-0", "http://<udn:blue/blue-0>:8080/hostname", "default network → blue"),
    misses("default/default-0", "http://<eth0:blue/blue-0>:8080/hostname", "default network → blue's eth0"),
    misses("default/default-1", "http://<eth0:red/red-0>:8080/hostname", "default network → red's eth0"),
    reaches(
        "default/default-0",
        "http://<eth0:default/default-1>:8080/hostname",
        "default-1",
        "the default network works as ever",
    ),
    Step(
        "a process of the pod's own node → eth0",
        "<node:blue/blue-0># curl -sS --max-time 3 http://<eth0:blue/blue-0>:8080/hostname",
        "no answer: the node's kubelet alone may",
        Unreachable(),
    ),
    Step(
        "another node → eth0",
        "<node:blue/blue-1># curl -sS --max-time 3 http://<eth0:blue/blue-0>:8080/hostname",
        "no answer",
        Unreachable(),
    ),
    Step(
        "kubelet's probes pass",
        "kubectl get pods -A -l app "
        r"-o 'jsonpath={range .items[*]}{.status.containerStatuses[*].restartCount} {end}'",
        "no container was ever restarted",
        Shows(matches=r"^[0 ]+$"),
    ),
)

PORTS: Final[Sequence[Step]] = (
    does(
        "open port 8080 of blue-0's eth0",
        f'kubectl annotate pod -n blue blue-0 \'{_OPEN}=[{{"protocol": "tcp", "port": 8080}}]\'',
    ),
    reaches(
        "default/default-0",
        "http://<eth0:blue/blue-0>:8080/hostname",
        "blue-0",
        "the default network reaches what was opened",
    ),
    Step(
        "a node reaches it, too",
        "<node:blue/blue-1># curl -sS --max-time 3 http://<eth0:blue/blue-0>:8080/hostname",
        "answers blue-0",
        Shows(("blue-0",)),
        within=15,
    ),
    misses("default/default-0", "http://<eth0:blue/blue-0>:9090/hostname", "the other port is closed"),
    misses("default/default-0", "http://<eth0:blue/blue-1>:8080/hostname", "the other pod is closed"),
    does("close it", f"kubectl annotate pod -n blue blue-0 {_OPEN}-"),
    misses("default/default-0", "http://<eth0:blue/blue-0>:8080/hostname", "it is closed again", within=15),
    does(
        "what cannot be understood",
        f"kubectl annotate pod -n blue blue-1 '{_OPEN}=[protocol: tcp'",
    ),
    Step(
        "is told",
        "kubectl events -n blue --for pod/blue-1 --types=Warning",
        "an event about the annotation",
        Shows((_OPEN,)),
        within=20,
    ),
    misses("default/default-0", "http://<eth0:blue/blue-1>:8080/hostname", "and opens nothing"),
    does("take it away", f"kubectl annotate pod -n blue blue-1 {_OPEN}-"),
)

PODS: Final = (
    Section(0, "namespaces, networks, pods", SETUP),
    Section(1, "commands in pods", ACCESS, (0,)),
    Section(2, "addresses, reachability, isolation", (*ADDRESSES, *PORTS), (0,)),
)
