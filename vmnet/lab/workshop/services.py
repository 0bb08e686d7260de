"""Sections 3 to 6: services, cluster services, egress, and two networks with one subnet."""

from collections.abc import Sequence
from typing import Final

from vmnet.lab.workshop.steps import (
    CURL,
    Section,
    Shows,
    Step,
    Unreachable,
    Words,
    does,
    in_pod,
    misses,
    reaches,
    waits,
)

_NODES: Final = (("n1", "172.30.0.11"), ("n2", "172.30.0.12"), ("n3", "172.30.0.13"))
_NODES_IPV6: Final = (("n1", "fd00:30::11"), ("n2", "fd00:30::12"), ("n3", "fd00:30::13"))
OUTSIDE: Final = "172.30.0.100"
_MIRRORED: Final = (
    "kubectl get endpointslices -n blue -l k8s.ovn.org/service-name=blue-service "
    "-o 'jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].addresses[*]}'"
)
_ASK_UDP: Final = (
    "python3 -c 'import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); "
    's.sendto(b"{word}", (sys.argv[1], int(sys.argv[2]))); print(s.recvfrom(99)[0].decode())\''
)


def from_outside(url: str, text: str, title: str, *, within: float = 20) -> Step:
    """The outside host fetches a URL."""
    return Step(title, f"outside# {CURL} {url}", f"answers {text}", Shows((text,)), within)


LOAD_BALANCERS: Final[Sequence[Step]] = (
    does("load balancers in blue and green, a service in default", "kubectl apply -f services.yaml", "three services"),
    Step(
        "the services",
        "kubectl get services -n blue",
        "a cluster address and an external one",
        Shows(matches=r"blue-service +LoadBalancer +10\.96\.\S+ +172\.30\.0\.2\d\d "),
        within=20,
    ),
    Step(
        "mirrored EndpointSlices",
        _MIRRORED,
        "the addresses that blue's pods have on the network",
        Words(("<udns:blue/app=blue>",)),
        within=30,
    ),
    reaches("blue/blue-near", "http://<cluster:blue/blue-service>/hostname", "blue-", "ClusterIP inside the network"),
    Step(
        "the client's address is preserved",
        in_pod("blue/blue-near", f"{CURL} http://<cluster:blue/blue-service>/clientip"),
        "blue-near's address on the network",
        Shows(("<udn:blue/blue-near>:",)),
        within=15,
    ),
    reaches("green/green-0", "http://<cluster:green/green-service>/hostname", "green-", "ClusterIP in green"),
    misses("blue/blue-0", "http://<cluster:green/green-service>/hostname", "blue → green's ClusterIP"),
    misses("green/green-0", "http://<cluster:blue/blue-service>/hostname", "green → blue's ClusterIP"),
    misses("default/default-0", "http://<cluster:blue/blue-service>/hostname", "default network → blue's ClusterIP"),
    reaches("default/default-0", "http://<cluster:default/default-service>/hostname", "default-", "default → default"),
    misses(
        "blue/blue-0", "http://<cluster:default/default-service>/hostname", "blue → the default network's ClusterIP"
    ),
    *(
        from_outside(f"http://{address}:<port:blue/blue-service>/hostname", "blue-", f"blue's node port on {name}")
        for name, address in _NODES
    ),
    *(
        from_outside(f"http://{address}:<port:green/green-service>/hostname", "green-", f"green's node port on {name}")
        for name, address in _NODES
    ),
    *(
        reaches(
            "blue/blue-near",
            f"http://{address}:<port:blue/blue-service>/hostname",
            "blue-",
            f"its own network's node port on {name}, from a pod",
        )
        for name, address in _NODES
    ),
    misses("blue/blue-0", "http://10.96.255.250/hostname", "a cluster address that nobody has"),
    from_outside("http://<balancer:blue/blue-service>/hostname", "blue-", "blue's load balancer"),
    from_outside("http://<balancer:green/green-service>/hostname", "green-", "green's load balancer"),
    Step(
        "a pod reaches its own service",
        in_pod(
            "blue/blue-0",
            f"sh -c 'for i in $(seq 30); do {CURL} http://<cluster:blue/blue-service>/hostname; echo; done'",
        ),
        "itself and the other pod answer, and every time somebody",
        Shows(("blue-0", "blue-1"), matches=r"\A(blue-[01]\n){30}\Z"),
        within=60,
    ),
)

ENDPOINTS: Final[Sequence[Step]] = (
    does("scale up", "kubectl scale -n blue sts/blue --replicas=3"),
    waits("three pods are ready", "kubectl rollout status -n blue sts/blue", "3 pods are ready"),
    Step("the slices follow", _MIRRORED, "three addresses", Words(("<udns:blue/app=blue>",)), within=30),
    reaches(
        "blue/blue-near",
        "http://<cluster:blue/blue-service>/hostname",
        "blue-2",
        "the new pod serves",
        within=60,
    ),
    does("scale down", "kubectl scale -n blue sts/blue --replicas=2"),
    waits("the third pod goes", "kubectl wait -n blue pod/blue-2 --for=delete", "deleted"),
    Step("the slices follow", _MIRRORED, "two addresses", Words(("<udns:blue/app=blue>",)), within=30),
    does("blue-1 is not ready any more", in_pod("blue/blue-1", "touch /run/unready-blue-1")),
    Step("the slices follow", _MIRRORED, "blue-0's address alone", Words(("<udn:blue/blue-0>",)), within=30),
    Step(
        "it is not sent anything",
        in_pod(
            "blue/blue-near",
            f"sh -c 'for i in $(seq 10); do {CURL} http://<cluster:blue/blue-service>/hostname; echo; done'",
        ),
        "blue-0 answers ten times",
        Shows(matches=r"\A(blue-0\n){10}\Z"),
        within=20,
    ),
    does("it is ready again", in_pod("blue/blue-1", "rm /run/unready-blue-1")),
    Step("the slices follow", _MIRRORED, "both addresses", Words(("<udns:blue/app=blue>",)), within=30),
)

KINDS: Final[Sequence[Step]] = (
    does("other kinds of service", "kubectl apply -f services-kinds.yaml", "seven services and a pod"),
    waits("the pod runs", "kubectl wait -n blue pod/blue-datagram --for=condition=Ready", "condition met"),
    Step(
        "session affinity",
        in_pod(
            "blue/blue-near",
            f"sh -c 'for i in $(seq 12); do {CURL} http://<cluster:blue/blue-sticky>/hostname; echo; done'",
        ),
        "one pod answers twelve times",
        Shows(matches=r"\A(blue-[01]\n)\1{11}\Z"),
        within=20,
    ),
    Step(
        "externalTrafficPolicy Local keeps the client's address",
        f"outside# {CURL} http://<balancer:blue/blue-external-local>/clientip",
        f"{OUTSIDE}, the outside host's own",
        Shows((f"{OUTSIDE}:",)),
        within=20,
    ),
    *(
        from_outside(
            f"http://<hostip:blue/{name}>:<port:blue/blue-external-local>/hostname",
            name,
            f"{name}'s node sends it to {name}",
        )
        for name in ("blue-0", "blue-1")
    ),
    Step(
        "a node without an endpoint does not",
        f"outside# {CURL} http://<freeip:blue/app=blue>:<port:blue/blue-external-local>/hostname",
        "no answer",
        Unreachable(),
    ),
    reaches(
        "blue/blue-near",
        "http://<balancer:blue/blue-external-local>/hostname",
        "blue-",
        "pods of the network use its address as the cluster address",
    ),
    reaches(
        "default/default-0",
        "http://<balancer:blue/blue-external-local>/hostname",
        "blue-",
        "pods of the default network, too, get every endpoint",
    ),
    Step(
        "load balancers are told which nodes have an endpoint",
        "outside# curl -sS -i --max-time 3 http://<hostip:blue/blue-0>:<health:blue/blue-external-local>/",
        "200, and one endpoint",
        Shows(('"localEndpoints": 1',), matches=r"^HTTP/1\.1 200 "),
        within=20,
    ),
    Step(
        "and which have none",
        "outside# curl -sS -i --max-time 3 http://<freeip:blue/app=blue>:<health:blue/blue-external-local>/",
        "503, and none",
        Shows(('"localEndpoints": 0',), matches=r"^HTTP/1\.1 503 "),
        within=20,
    ),
    Step(
        "a load balancer without node ports",
        "kubectl get service -n blue blue-balancer-alone -o 'jsonpath={.spec.ports[*].nodePort}'",
        "none",
        Words(()),
    ),
    from_outside("http://<balancer:blue/blue-balancer-alone>/hostname", "blue-", "its address"),
    Step(
        "internalTrafficPolicy Local stays on the node",
        in_pod(
            "blue/blue-near",
            f"sh -c 'for i in $(seq 6); do {CURL} http://<cluster:blue/blue-internal-local>/hostname; echo; done'",
        ),
        "blue-0, which is on the same node, answers six times",
        Shows(matches=r"\A(blue-0\n){6}\Z"),
        within=20,
    ),
    reaches("blue/blue-near", "http://<cluster:blue/blue-named>/hostname", "blue-", "a target port by its name"),
    Step(
        "a headless service's names",
        in_pod("blue/blue-near", "dig +short +search +timeout=3 blue-headless"),
        "the addresses that the pods have on the network",
        Words(("<udns:blue/app=blue>",)),
        within=20,
    ),
    Step(
        "UDP by ClusterIP",
        in_pod("blue/blue-near", f"{_ASK_UDP.format(word='hostname')} <cluster:blue/blue-datagram> 81"),
        "answers blue-datagram",
        Shows(("blue-datagram",)),
        within=20,
    ),
    *(
        Step(
            f"UDP by the node port on {name}",
            f"outside# {_ASK_UDP.format(word='hostname')} {address} <port:blue/blue-datagram>",
            "answers blue-datagram",
            Shows(("blue-datagram",)),
            within=20,
        )
        for name, address in _NODES
    ),
    Step("SCTP", "kubectl apply -f service-sctp.yaml", "a service and a pod", Shows(), needs_sctp=True),
    Step(
        "SCTP: the pod runs",
        "kubectl wait -n blue pod/blue-sctp --for=condition=Ready --timeout=90s",
        "condition met",
        Shows(),
        needs_sctp=True,
    ),
    Step(
        "SCTP by ClusterIP",
        in_pod(
            "blue/blue-near",
            "python3 -c 'import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132); "
            's.settimeout(3); s.connect((sys.argv[1], 82)); s.send(b"hostname"); print(s.recv(99).decode())\' '
            "<cluster:blue/blue-sctp>",
        ),
        "answers blue-sctp",
        Shows(("blue-sctp",)),
        within=20,
        needs_sctp=True,
    ),
)

DUAL_STACK: Final[Sequence[Step]] = (
    does("a network of both families", "kubectl apply -f dual-stack.yaml"),
    waits("its pods run", "kubectl rollout status -n violet sts/violet", "2 new pods are ready"),
    reaches("violet/violet-0", "http://<udn:violet/violet-1>:8080/hostname", "violet-1", "IPv4 across nodes"),
    reaches("violet/violet-0", "http://[<udn6:violet/violet-1>]:8080/hostname", "violet-1", "IPv6 across nodes"),
    reaches("violet/violet-0", "http://<cluster:violet/violet-service>/hostname", "violet-", "IPv4 ClusterIP"),
    reaches("violet/violet-0", "http://[<cluster6:violet/violet-service>]/hostname", "violet-", "IPv6 ClusterIP"),
    reaches("violet/violet-0", "http://[<cluster6:violet/violet-ipv6>]/hostname", "violet-", "a service of IPv6 alone"),
    *(
        from_outside(
            f"http://[{address}]:<port:violet/violet-service>/hostname", "violet-", f"IPv6 node port on {name}"
        )
        for name, address in _NODES_IPV6
    ),
    from_outside("http://<balancer:violet/violet-service>/hostname", "violet-", "IPv4 load balancer"),
    from_outside("http://[<balancer6:violet/violet-service>]/hostname", "violet-", "IPv6 load balancer"),
    misses("blue/blue-0", "http://<cluster:violet/violet-service>/hostname", "blue → violet's ClusterIP"),
    Step(
        "IPv6 egress",
        in_pod("violet/violet-0", f"{CURL} http://[fd00:30::100]/"),
        "the outside host answers, and sees a node",
        Shows(matches=r'"client": "fd00:30::1\d"'),
        within=20,
    ),
)

_TENANTS: Final = ("blue/blue-0", "green/green-0", "red/red-0", "yellow/yellow-0")

CLUSTER_SERVICES: Final[Sequence[Step]] = (
    *(
        reaches(pod, "-k https://kubernetes.default.svc/healthz", "ok", f"the API from {pod.partition('/')[0]}")
        for pod in _TENANTS
    ),
    *(
        Step(
            f"the cluster DNS from {pod.partition('/')[0]}",
            in_pod(pod, "dig +short +timeout=3 kubernetes.default.svc.cluster.local"),
            "10.96.0.1",
            Words(("10.96.0.1",)),
            within=15,
        )
        for pod in _TENANTS
    ),
    Step(
        "the world's names",
        in_pod("blue/blue-0", "dig +short +timeout=3 www.outside.test"),
        OUTSIDE,
        Words((OUTSIDE,)),
        within=15,
    ),
)

EGRESS: Final[Sequence[Step]] = tuple(
    step
    for pod in _TENANTS
    for step in (
        Step(
            f"ping from {pod.partition('/')[0]}",
            in_pod(pod, f"ping -c 2 -W 3 {OUTSIDE}"),
            "no packet is lost",
            Shows((" 0% packet loss",)),
            within=15,
        ),
        Step(
            f"HTTP from {pod.partition('/')[0]}",
            in_pod(pod, f"{CURL} http://{OUTSIDE}/"),
            "the outside host answers, and sees a node",
            Shows(matches=r'"client": "172\.30\.0\.1\d"'),
            within=15,
        ),
    )
)

SAME_SUBNET: Final[Sequence[Step]] = (
    does("twin: the subnet of blue once more", "kubectl apply -f same-subnet.yaml"),
    waits("its pods run", "kubectl rollout status -n twin sts/twin", "3 new pods are ready"),
    Step(
        "equal addresses live side by side",
        "kubectl get pods -n twin -l app=twin -o "
        r"'jsonpath={.items[*].metadata.annotations.k8s\.ovn\.org/pod-networks}'",
        "blue-0's address is one of twin's, too",
        Shows(('"<udn:blue/blue-0>/24"',)),
    ),
    reaches("twin/twin-0", "http://<udn:twin/twin-1>:8080/hostname", "twin-1", "twin → twin"),
    reaches("blue/blue-0", "http://<udn:blue/blue-1>:8080/hostname", "blue-1", "blue → blue"),
    reaches("twin/twin-0", f"http://{OUTSIDE}/", '"client": "172.30.0.1', "egress from twin"),
    reaches("blue/blue-0", f"http://{OUTSIDE}/", '"client": "172.30.0.1', "egress from blue"),
    reaches("twin/twin-0", "http://<cluster:twin/twin-service>/hostname", "twin-", "twin's service in twin"),
    from_outside("http://<balancer:twin/twin-service>/hostname", "twin-", "twin's load balancer"),
    from_outside("http://<balancer:blue/blue-service>/hostname", "blue-", "blue's load balancer"),
    *(
        from_outside(f"http://{address}:<port:twin/twin-service>/hostname", "twin-", f"twin's node port on {name}")
        for name, address in _NODES
    ),
)

SERVICES: Final = (
    Section(3, "services", (*LOAD_BALANCERS, *ENDPOINTS, *KINDS, *DUAL_STACK), (0,)),
    Section(4, "cluster services", CLUSTER_SERVICES, (0,)),
    Section(5, "egress", EGRESS, (0,)),
    Section(6, "the same subnet twice", SAME_SUBNET, (0, 3)),
)
