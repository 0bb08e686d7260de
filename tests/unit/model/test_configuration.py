import dataclasses
import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest

from vmnet.model import configuration
from vmnet.model.configuration import (
    BY_PATH,
    OPTIONS,
    Agent,
    Configuration,
    ConfigurationError,
    Controller,
    Dns,
    ListenAddress,
    Shared,
)

SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT.*|PORT(_[0-9]+_.*)?)$")


def test_the_defaults_are_allowed_and_frozen() -> None:
    found = Configuration()
    assert {item.path: found.value(item) for item in OPTIONS} == {item.path: item.default for item in OPTIONS}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.dns.ttl = 5  # type: ignore[misc]


def test_every_option_has_names_of_its_own_and_says_what_it_is() -> None:
    assert len(BY_PATH) == len(OPTIONS) == len({item.variables[0] for item in OPTIONS})
    for item in OPTIONS:
        assert item.flag.startswith("--")
        assert len(item.explanation) > 15
        assert not item.explanation.endswith(".")
        # The kubelet makes variables with these ends of the names of Services.
        assert not any(SERVICE_LINK.search(variable) for variable in item.variables)


def test_what_flags_have_been_called_they_are_called_still() -> None:
    assert {item.flag for item in OPTIONS if item.section in ("shared", "agent", "dns")} >= {
        *("--node-name", "--kubeconfig", "--metrics-address", "--cluster-domain", "--dns-upstream", "--dns-ttl"),
        *("--log-dns-queries", "--dns-socket", "--default-service", "--service-range", "--cni-socket", "--multus"),
        *("--cni-conf-dir", "--cni-bin-dir", "--install-cni", "--localnet", "--kubelet-cgroup", "--log-level"),
    }
    assert {item.flag for item in OPTIONS if item.section in ("shared", "controller")} >= {
        *("--kubeconfig", "--namespace", "--metrics-address", "--webhook-address", "--webhook-url"),
        *("--cluster-domain", "--log-level"),
    }


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (Dns, "ttl", 31),
        (Dns, "ttl", "30"),
        (Dns, "ttl", True),
        (Dns, "ttl", 7.0),
        (Dns, "log_queries", 1),
        (Dns, "socket", "/run/dns.sock"),
        (Dns, "upstreams", ["192.0.2.1"]),
        (Dns, "upstreams", ("192.0.2.1", "nobody")),
        (Shared, "log_level", "INFO"),
        (Shared, "cluster_domain", None),
        (Agent, "metrics_address", ("127.0.0.1", 1)),
        (Agent, "metrics_address", ListenAddress("127.0.0.1", 0)),
        (Agent, "metrics_address", ListenAddress("::x", 1)),
        (Agent, "localnets", {"physnet": "br0"}),
        (Agent, "default_services", 7),
        (Controller, "webhook_url", "http://example.org"),
    ],
)
def test_no_section_is_made_with_what_is_not_allowed(section: type[Any], name: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as raised:
        section(**{name: value})
    (problem,) = raised.value.problems
    (option,) = (item for item in configuration.options_of(section) if item.name == name)
    assert problem.startswith(f"{option.path}: {value!r} is not ")
    assert option.allowed in problem


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("agent.metricsAddress", "[::]:9465", ListenAddress("::", 9465)),
        ("agent.metricsAddress", ":9465", ListenAddress("", 9465)),
        ("agent.metricsAddress", "localhost:1", ListenAddress("localhost", 1)),
        ("agent.localnets", "physnet=br-ex, storage=br1", (("physnet", "br-ex"), ("storage", "br1"))),
        ("agent.serviceRanges", "10.0.0.0/8,fd00::/64", tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/64")))),
        ("agent.kubeletCgroup", "", ""),
        ("agent.defaultServices", "", ()),
        ("shared.logLevel", "DEBUG", "debug"),
        ("shared.kubeconfig", "a/b", Path("a/b")),
        ("dns.logQueries", "1", True),
        (
            "dns.upstreams",
            "192.0.2.1:53,example.org=[2001:db8::1]:53",
            ("192.0.2.1:53", "example.org=[2001:db8::1]:53"),
        ),
        ("controller.webhookUrl", "https://[::1]:9443", "https://[::1]:9443"),
    ],
)
def test_texts_have_values(path: str, text: str, value: object) -> None:
    assert BY_PATH[path].read_variable(text) == value
    BY_PATH[path].check(value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        *(
            ("agent.metricsAddress", text)
            for text in ("9465", "::1:9465", "[::1]9465", "[x]:1", "a b:1", "h:65536", "h:")
        ),
        *(("agent.localnets", text) for text in ("physnet", "=br0", "physnet=", "physnet=a-name-that-is-too-long")),
        *(("agent.localnets", text) for text in ("physnet=br0,physnet=br1", "physnet=a b")),
        *(("agent.serviceRanges", text) for text in ("10.0.0.1/8", "10.0.0.0/33", "all")),
        *(("agent.defaultServices", text) for text in ("kube-dns", "a/b/c", "/b", "a/", "A/b")),
        *(("dns.upstreams", text) for text in ("host", "192.0.2.1:0", "192.0.2.1:x", "a..b=192.0.2.1", "=192.0.2.1")),
        *(
            ("controller.webhookUrl", text)
            for text in ("https://", "https://h/path", "https://h:x", "https://u@h", "h:1")
        ),
        *(("shared.clusterDomain", text) for text in ("", "a..b", "x" * 64, ".", "Cluster.local")),
        *(("dns.ttl", text) for text in ("4", "31", "ten", "", "1e1", "٣")),
        ("agent.multus", "maybe"),
        ("agent.kubeletCgroup", "kubelet"),
        ("shared.kubeconfig", ""),
        ("dns.logQueries", "perhaps"),
    ],
)
def test_texts_that_have_none_are_told_what_is_allowed(path: str, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        BY_PATH[path].read_variable(text)
    assert BY_PATH[path].kind.allowed in str(raised.value) or "there twice" in str(raised.value)


def test_the_schema_knows_every_key_and_no_other() -> None:
    sections = configuration.schema()["properties"]
    assert {f"{name}.{key}" for name, section in sections.items() for key in section["properties"]} == BY_PATH.keys()
    assert not any(section["additionalProperties"] for section in sections.values())
