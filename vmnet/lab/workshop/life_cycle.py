"""Sections 8 to 10: networks that come and go, secondary networks, and that nothing stays behind."""

from collections.abc import Sequence
from typing import Final

from vmnet.lab.workshop.steps import CURL, Section, Shows, Step, Words, does, reaches, waits

_CONDITIONS: Final = "jsonpath={.status.conditions[*].message}"
_NODES: Final = ("n1", "n2", "n3")
_GONE: Final = r"103\.103|203\.203|192\.168|106\.106"

SELECTOR: Final[Sequence[Step]] = (
    does("one more namespace", "kubectl apply -f more-namespaces.yaml"),
    does(
        "the network's selector takes it in",
        "kubectl patch cudn colored-enterprise --type=json -p "
        """'[{"op": "add", "path": "/spec/namespaceSelector/matchExpressions/0/values/-", "value": "orange"}]'""",
    ),
    waits(
        "it has the attachment definition",
        "kubectl wait -n orange net-attach-def/colored-enterprise --for=create",
        "condition met",
    ),
    Step(
        "the network says so",
        f"kubectl get cudn colored-enterprise -o '{_CONDITIONS}'",
        "the namespaces' names",
        Shows(("orange", "red", "yellow")),
        within=20,
    ),
    does(
        "somebody deletes the definition",
        "kubectl delete net-attach-def -n orange colored-enterprise --wait=false",
    ),
    Step(
        "it returns",
        "kubectl get net-attach-def -n orange -o "
        "'jsonpath={range .items[*]}{.metadata.name}{.metadata.deletionTimestamp}{end}'",
        "colored-enterprise, and it is not being deleted",
        Words(("colored-enterprise",)),
        within=30,
    ),
    does(
        "the selector leaves the namespace out again",
        "kubectl patch cudn colored-enterprise --type=json -p "
        """'[{"op": "remove", "path": "/spec/namespaceSelector/matchExpressions/0/values/2"}]'""",
    ),
    Step(
        "the definition goes",
        "kubectl get net-attach-def -n orange -o name",
        "nothing",
        Words(()),
        within=30,
    ),
    does("the namespace goes", "kubectl delete -f more-namespaces.yaml"),
)

LATE: Final[Sequence[Step]] = (
    does("a labelled namespace without a network, and a pod", "kubectl apply -f late.yaml"),
    Step(
        "the pod waits, and says for what",
        "kubectl events -n late --for pod/waits --types=Warning",
        "an event about the primary network",
        Shows(matches="(?i)primary"),
        within=60,
    ),
    Step(
        "it is pending",
        "kubectl get pod -n late waits -o jsonpath={.status.phase}",
        "Pending",
        Words(("Pending",)),
    ),
    does("the network comes", "kubectl apply -f late-network.yaml"),
    waits("the pod starts", "kubectl wait -n late pod/waits --for=condition=Ready", "condition met", seconds=150),
    does("the network is deleted while the pod uses it", "kubectl delete -n late udn/late-network --wait=false"),
    Step(
        "it stays, and names the pod",
        f"kubectl get udn -n late late-network -o '{_CONDITIONS}'",
        "a condition that names late/waits",
        Shows(("waits",)),
        within=30,
    ),
    reaches("late/waits", "http://172.30.0.100/", '"client"', "the pod goes on as before"),
    does("the pod goes", "kubectl delete pod -n late waits"),
    waits("now the network goes", "kubectl wait -n late udn/late-network --for=delete", "deleted"),
    Step("and its definition", "kubectl get net-attach-def -n late -o name", "nothing", Words(()), within=20),
    does("the namespace goes", "kubectl delete namespace late"),
)

_IN_EXTRA: Final = "kubectl get pod -n extra extra-1 -o"
_PEER: Final = r"jsonpath={.metadata.annotations.k8s\.v1\.cni\.cncf\.io/network-status}"


def _across(topology: str, pods: str, interface: str) -> Step:
    """One pod of ``extra`` reaches the other one by a secondary network."""
    url = f"http://<{interface}:extra/{pods}-1>:8080/hostname"
    return Step(
        f"{topology} across nodes, by {interface}",
        f"kubectl exec -n extra {pods}-0 -- {CURL} --interface {interface} {url}",
        f"answers {pods}-1",
        Shows((f"{pods}-1",)),
        within=20,
    )


SECONDARY: Final[Sequence[Step]] = (
    does("networks beside the default one, and two pods", "kubectl apply -f secondary.yaml"),
    waits("extra-0 runs", "kubectl wait -n extra pod/extra-0 --for=condition=Ready", "condition met"),
    waits("extra-1 runs", "kubectl wait -n extra pod/extra-1 --for=condition=Ready", "condition met"),
    Step(
        "the interfaces",
        "kubectl exec -n extra -it extra-0 -- ip -br a",
        "eth0, net1, net2",
        Shows(matches=r"(?s)eth0@.*10\.244\..*net1@.*10\.101\.0\..*net2@.*10\.102\."),
    ),
    Step(
        "the default route stays",
        "kubectl exec -n extra -it extra-0 -- ip r",
        "by eth0",
        Shows(matches=r"^default via 10\.244\.\d+\.1 dev eth0"),
    ),
    Step(
        "the status of its networks",
        f"{_IN_EXTRA} '{_PEER}'",
        "eth0, and two more",
        Shows(('"interface": "net1"', '"interface": "net2"')),
    ),
    _across("Layer2", "extra", "net1"),
    _across("Layer3", "extra", "net2"),
    does("a network of the nodes' own bridge, and two pods", "kubectl apply -f localnet.yaml"),
    waits("local-0 runs", "kubectl wait -n extra pod/local-0 --for=condition=Ready", "condition met"),
    waits("local-1 runs", "kubectl wait -n extra pod/local-1 --for=condition=Ready", "condition met"),
    _across("Localnet", "local", "net1"),
    does("all of it goes", "kubectl delete -f localnet.yaml -f secondary.yaml --timeout=120s"),
)

TEAR_DOWN: Final[Sequence[Step]] = (
    does("blue's network is deleted while it is in use", "kubectl delete udn -n blue blue-network --wait=false"),
    Step(
        "it stays, and names the pods",
        f"kubectl get udn -n blue blue-network -o '{_CONDITIONS}'",
        "a condition that names blue-0 and blue-1",
        Shows(("blue-0", "blue-1")),
        within=30,
    ),
    reaches("blue/blue-0", "http://<udn:blue/blue-1>:8080/hostname", "blue-1", "blue works as before"),
    does(
        "the pods of the workshop go",
        "kubectl delete -f pods.yaml -f neighbours.yaml --ignore-not-found",
    ),
    does("those of the other sections", "kubectl delete pods --all -n blue"),
    waits("now blue's network goes", "kubectl wait -n blue udn/blue-network --for=delete", "deleted"),
    does(
        "everything else goes",
        "kubectl delete -f dual-stack.yaml -f same-subnet.yaml -f services-kinds.yaml -f services.yaml "
        "--ignore-not-found --timeout=120s",
    ),
    does("the networks go", "kubectl delete -f networks.yaml --ignore-not-found --timeout=120s"),
    does("the namespaces go", "kubectl delete -f namespaces.yaml --ignore-not-found --timeout=120s"),
    *(
        step
        for node in _NODES
        for step in (
            Step(
                f"no network namespace is left on {node}",
                f"{node}# sh -c 'ls /run/netns | grep ^vmnet- || true'",
                "nothing",
                Words(()),
                within=60,
            ),
            Step(
                f"no link is left on {node}",
                f"{node}# sh -c 'ip -br link | grep -E \"^(vmj|vml|vx|rt|vmn)\" || true'",
                "nothing",
                Words(()),
                within=30,
            ),
            Step(
                f"no rule names what is gone on {node}",
                f"{node}# sh -c 'nft list ruleset | grep -E \"{_GONE}|vm[jl][0-9]\" || true'",
                "nothing",
                Words(()),
                within=30,
            ),
            Step(
                f"no route and no routing rule is left on {node}",
                f"{node}# sh -c 'ip route show table all; ip rule; ip -6 rule'",
                "none of a network",
                Shows(never=("103.103.", "203.203.", "192.168.", "106.106.", "dev vmj")),
                within=30,
            ),
        )
    ),
)

LIFE_CYCLE: Final = (
    Section(8, "networks come and go", (*SELECTOR, *LATE), (0,)),
    Section(9, "secondary networks", SECONDARY),
    Section(10, "nothing stays behind", TEAR_DOWN, (0,)),
)
