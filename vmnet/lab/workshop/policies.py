"""Section 7: NetworkPolicy inside the networks."""

from collections.abc import Sequence
from typing import Final

from vmnet.lab.workshop.steps import Section, Shows, Step, does, in_pod, misses, reaches

CONVERGENCE: Final = 20.0
"""Seconds in which a change of policies or labels must have taken effect."""

EGRESS_POLICY: Final[Sequence[Step]] = (
    reaches("red/red-0", "http://<udn:yellow/yellow-0>:9090/hostname", "yellow-0", "before: red → yellow 9090"),
    does("one pod of yellow and one of blue are labelled", "kubectl label pod -n yellow yellow-0 reachable=yes"),
    does("the same label in blue", "kubectl label pod -n blue blue-0 reachable=yes"),
    does("red may only speak to such pods, on TCP 8080", "kubectl apply -f policy-egress.yaml"),
    misses("red/red-0", "http://<udn:yellow/yellow-0>:9090/hostname", "red → yellow 9090", within=CONVERGENCE),
    reaches("red/red-0", "http://<udn:yellow/yellow-0>:8080/hostname", "yellow-0", "red → yellow 8080"),
    misses("red/red-0", "http://<udn:yellow/yellow-1>:8080/hostname", "red → the pod without the label"),
    misses("red/red-0", "http://<udn:red/red-1>:8080/hostname", "red → red without the label"),
    misses("red/red-0", "http://<udn:blue/blue-0>:8080/hostname", "red → blue: a policy never joins two networks"),
    misses("red/red-0", "http://<eth0:blue/blue-0>:8080/hostname", "nor by eth0"),
    misses("red/red-0", "http://172.30.0.100/", "red → the outside host"),
    reaches("yellow/yellow-1", "http://<udn:red/red-0>:9090/hostname", "red-0", "replies of red leave: yellow → red"),
    Step(
        "kubelet's probes pass",
        "kubectl get pods -n red -o 'jsonpath={.items[*].status.containerStatuses[*].restartCount}'",
        "no container was restarted",
        Shows(matches=r"^0( 0)*$"),
    ),
    does("a label is added", "kubectl label pod -n yellow yellow-1 reachable=yes"),
    reaches(
        "red/red-0",
        "http://<udn:yellow/yellow-1>:8080/hostname",
        "yellow-1",
        "and the pod is reachable",
        within=CONVERGENCE,
    ),
    does("a label is removed", "kubectl label pod -n yellow yellow-0 reachable-"),
    misses("red/red-0", "http://<udn:yellow/yellow-0>:8080/hostname", "and the pod is not", within=CONVERGENCE),
    does("the policy goes", "kubectl delete -f policy-egress.yaml"),
    reaches(
        "red/red-0", "http://<udn:yellow/yellow-0>:9090/hostname", "yellow-0", "all is open again", within=CONVERGENCE
    ),
)

INGRESS_POLICY: Final[Sequence[Step]] = (
    does("default deny, both ways", "kubectl apply -f policy-deny.yaml"),
    misses("red/red-0", "http://<udn:yellow/yellow-0>:8080/hostname", "red → yellow", within=CONVERGENCE),
    misses("yellow/yellow-0", "http://<udn:yellow/yellow-1>:8080/hostname", "yellow → yellow", within=CONVERGENCE),
    misses("yellow/yellow-0", "http://<udn:red/red-0>:8080/hostname", "yellow → red"),
    Step(
        "ICMP, too",
        in_pod("red/red-0", "sh -c 'ping -c 1 -W 2 <udn:yellow/yellow-0>; echo status $?'"),
        "no reply",
        Shows(("status 1",)),
    ),
    does(
        "only ingress is denied",
        """kubectl patch networkpolicy -n yellow deny -p '{"spec": {"policyTypes": ["Ingress"]}}'""",
    ),
    reaches("yellow/yellow-0", "http://<udn:red/red-0>:8080/hostname", "red-0", "yellow → red", within=CONVERGENCE),
    does("yellow-0 may speak to its like", "kubectl apply -f policy-pods.yaml"),
    reaches(
        "yellow/yellow-0",
        "http://<udn:yellow/yellow-1>:8080/hostname",
        "yellow-1",
        "yellow-0 → yellow-1",
        within=CONVERGENCE,
    ),
    misses("yellow/yellow-1", "http://<udn:yellow/yellow-0>:8080/hostname", "yellow-1 → yellow-0"),
    misses("red/red-0", "http://<udn:yellow/yellow-0>:8080/hostname", "red → yellow"),
    does("policies add up: red may use the named port", "kubectl apply -f policy-namespace.yaml"),
    reaches(
        "red/red-0", "http://<udn:yellow/yellow-0>:9090/hostname", "yellow-0", "red → yellow 9090", within=CONVERGENCE
    ),
    misses("red/red-0", "http://<udn:yellow/yellow-0>:8080/hostname", "red → yellow 8080"),
    reaches("yellow/yellow-0", "http://<udn:yellow/yellow-1>:8080/hostname", "yellow-1", "the first still holds"),
    does("addresses but one, on ports 8000 to 8999", "kubectl apply -f policy-block.yaml"),
    does(
        "the one is red-1's",
        "kubectl patch networkpolicy -n yellow from-block --type=json -p "
        """'[{"op": "replace", "path": "/spec/ingress/0/from/0/ipBlock/except", "value": ["<udn:red/red-1>/32"]}]'""",
    ),
    reaches(
        "red/red-0", "http://<udn:yellow/yellow-0>:8080/hostname", "yellow-0", "red-0 → yellow 8080", within=CONVERGENCE
    ),
    misses("red/red-1", "http://<udn:yellow/yellow-0>:8080/hostname", "red-1 → yellow 8080", within=CONVERGENCE),
    reaches("red/red-1", "http://<udn:yellow/yellow-0>:9090/hostname", "yellow-0", "red-1 → yellow 9090"),
    does("all policies go", "kubectl delete networkpolicy -n yellow --all"),
    reaches(
        "red/red-1", "http://<udn:yellow/yellow-0>:8080/hostname", "yellow-0", "all is open again", within=CONVERGENCE
    ),
)

POLICIES: Final = (Section(7, "network policies", (*EGRESS_POLICY, *INGRESS_POLICY), (0,)),)
