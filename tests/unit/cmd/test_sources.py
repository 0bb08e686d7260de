"""Which value counts, and what is said of those that cannot be."""

import argparse
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vmnet.cmd import config, sources
from vmnet.cmd.sources import settle
from vmnet.model.configuration import (
    BY_PATH,
    OPTIONS,
    Boolean,
    Choice,
    ConfigurationError,
    Integer,
    ListenAddress,
    Option,
    assemble,
    schema,
)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sources.add_arguments(parser, "shared", "agent", "dns")
    return parser.parse_args(words)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_a_flag_is_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "# ours\ndns:\n  ttl: 10\n  logQueries: true\nagent:\n  localnets: {a: br0}\nshared:\ncontroller: {}\n",
    )
    found = settle(
        arguments("--config", path, "--dns-ttl", "12", "--localnet", "b=br1", "--localnet", "c=br2"),
        {"VMNET_DNS_TTL": "11", "VMNET_AGENT_LOCALNETS": "d=br3", "VMNET_LOG_LEVEL": "WARNING", "HOME": "/"},
    )
    assert found.configuration.dns.ttl == 12
    assert found.configuration.agent.localnets == (("b", "br1"), ("c", "br2"))
    origins = {item.option.path: str(item.origin) for item in found.settings}
    assert origins["dns.ttl"] == "flag --dns-ttl"
    assert origins["dns.logQueries"] == f"file {path}:4"
    assert origins["shared.logLevel"] == "environment VMNET_LOG_LEVEL"
    assert origins["agent.multus"] == "default"
    assert settle(arguments("--no-log-dns-queries"), {"VMNET_CONFIG": path}).configuration.dns.log_queries is False


def test_a_second_variable_counts_where_the_first_is_not_set() -> None:
    assert settle(arguments(), {"NODE_NAME": "n1"}).configuration.agent.node_name == "n1"
    both = {"NODE_NAME": "n1", "VMNET_AGENT_NODE_NAME": "n2"}
    assert settle(arguments(), both).configuration.agent.node_name == "n2"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("dns: {ttl: 99}", ["1: dns.ttl: '99' is not a whole number from 5 to 30"]),
        ("dns:\n  ttl: '30'", ["2: dns.ttl: '30' is text, not a whole number from 5 to 30 (seconds)"]),
        ("dns:\n  ttl: 7.5", ["2: dns.ttl: '7.5' is a number with a fraction, not a whole number"]),
        ("dns: {ttl: null}", ["1: dns.ttl: '' is nothing, not", "1: dns.ttl: 'null' is nothing, not"]),
        ("dns: {logQueries: 1}", ["1: dns.logQueries: '1' is a whole number, not true or false"]),
        (
            "\ndns: {tll: 5}",
            ["2: dns.tll: there is no such key (is it ttl?); dns has upstreams, ttl, logQueries, socket"],
        ),
        ("dnss: {}", ["1: dnss: there is no such key (is it dns?); the file has shared, controller, agent, dns"]),
        ("dns: [ttl]", ["1: dns is a list, not a mapping with upstreams, ttl"]),
        ("ttl", ["1: the file is text, not a mapping with shared, controller, agent, dns"]),
        ("dns: {ttl: 5}\ndns: {ttl: 6}", ["2: dns is there twice"]),
        ("dns:\n  ttl: 5\n  ttl: 6", ["3: ttl is there twice"]),
        ("dns: {upstreams: 192.0.2.1}", ["1: dns.upstreams: text is not a list, each [DOMAIN=]ADDRESS[:PORT]"]),
        ("dns: {upstreams: [[192.0.2.1]]}", ["1: dns.upstreams: a list is not [DOMAIN=]"]),
        ("agent: {localnets: [a=b]}", ["1: agent.localnets: a list is not a mapping, each PHYSICAL=BRIDGE"]),
        ("agent: {localnets: {a: 7}}", ["1: agent.localnets: '7' is a whole number, not a mapping"]),
        ("agent: {localnets: {a: b, a: c}}", ["1: agent.localnets: a name is there twice"]),
        ("agent: {multus: sometimes}", ["1: agent.multus: 'sometimes' is not one of auto, yes, no"]),
        ("agent: {metricsAddress: [::]:9465}", ["1: not YAML"]),
        ("shared:\n\tlogLevel: info", ["2: not YAML"]),
        ("{}\n---\n{}", ["2: not YAML"]),
        ("shared: &a {clusterDomain: a}\n<<: *a", ["2: <<: there is no such key"]),
        ("? [a]\n: b", ["1: a list: there is no such key"]),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, problems: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as raised:
        settle(arguments("--config", path), {})
    assert len(raised.value.problems) == 1
    assert any(raised.value.problems[0].startswith(f"{path}:{problem}") for problem in problems), raised.value.problems


def test_a_plain_no_is_a_word_where_words_are_chosen_from(tmp_path: Path) -> None:
    path = written(tmp_path, "agent: {multus: no, kubeletCgroup: ''}\ndns: {ttl: 0x10}")
    found = settle(arguments("--config", path), {}).configuration
    assert (found.agent.multus, found.agent.kubelet_cgroup, found.dns.ttl) == ("no", "", 16)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "dns: {ttl: 99, socket: 5}\nagent: {nodeName: a_b}\n")
    environment = {"VMNET_DNS_TTL": "soon", "VMNET_CLUSTER_DOMIAN": "x", "VMNET_CONFIG": path}
    with pytest.raises(ConfigurationError) as raised:
        settle(arguments(), environment)
    assert [problem.split(": ")[0] for problem in raised.value.problems] == [
        *(f"{path}:1", f"{path}:1", f"{path}:2"),
        "variable VMNET_DNS_TTL (dns.ttl)",
        "variable VMNET_CLUSTER_DOMIAN",
    ]
    assert "is it VMNET_CLUSTER_DOMAIN?" in raised.value.problems[-1]


@pytest.mark.parametrize(
    "variable", ["VMNET_LOGLEVEL", "VMNET_CLUSTER_DOMAINS", "VMNET_CONFIGS", "VMNET_DNS_X", "VMNET_CONTROLLER_NAME"]
)
def test_a_variable_that_is_meant_for_us_and_is_none_is_told(variable: str) -> None:
    with pytest.raises(ConfigurationError, match=f"variable {variable}: there is no such option"):
        settle(arguments(), {variable: "x"})


def test_what_the_kubelet_and_our_other_programs_set_is_no_mistake() -> None:
    environment = {
        "VMNET_CONTROLLER_METRICS_SERVICE_HOST": "10.0.0.1",
        "VMNET_CONTROLLER_METRICS_PORT": "tcp://10.0.0.1:9411",
        "VMNET_WEBHOOK_PORT_443_TCP_ADDR": "10.0.0.2",
        "VMNET_WEBHOOK_SERVICE_PORT_WEBHOOK": "443",
        "VMNET_LAB_DIR": "/tmp",
        "VMNET_ALERTS": "1",
        "VMNET_CNI_SOCKET": "/x",
    }
    assert all(item.origin.source == "default" for item in settle(arguments(), environment).settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dns-ttl", "31"], "argument --dns-ttl: '31' is not a whole number from 5 to 30"),
        (["--localnet", "physnet"], "argument --localnet: 'physnet' is not PHYSICAL=BRIDGE"),
        (["--localnet", "a=b", "--localnet", "a=c"], "argument --localnet: a name is there twice"),
        (["--multus", "never"], "argument --multus: 'never' is not one of auto, yes, no"),
        (["--dns-tt", "5"], "--dns-tt"),
    ],
)
def test_a_flag_that_cannot_be_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    sources.add_arguments(parser, "agent", "dns")
    with pytest.raises(SystemExit) as raised:
        parser.parse_args(words)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        settle(arguments("--config", str(tmp_path / "none")), {})
    huge = tmp_path / "huge"
    huge.write_bytes(b"#" * (sources.MAX_FILE + 2))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    deep = tmp_path / "deep"
    deep.write_text("[" * 5000)
    for path in (huge, binary, deep):
        with pytest.raises(ConfigurationError, match=str(path)):
            settle(arguments("--config", str(path)), {})


# -- what is written is read again

_NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
_PORTS = st.integers(1, 65535)
_HOSTS = st.one_of(st.ip_addresses().map(str), _NAMES, st.just(""))
_LISTEN = st.builds(ListenAddress, _HOSTS, _PORTS)
_NETWORKS = st.one_of(st.just("10.0.0.0/8"), st.just("fd00::/8"), st.just("0.0.0.0/0"))
_SERVERS = st.one_of(st.ip_addresses().map(str), st.ip_addresses(v=6).map(lambda ip: f"corp.example=[{ip}]:5353"))
_PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).map(
    Path
)
_SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "agent.localnets": st.dictionaries(_NAMES, st.from_regex(r"[a-z0-9.:_-]{1,15}", fullmatch=True), max_size=3).map(
        lambda found: tuple(found.items())
    ),
    "agent.serviceRanges": st.lists(_NETWORKS.map(BY_PATH["agent.serviceRanges"].kind.read), max_size=2).map(tuple),
    "agent.defaultServices": st.lists(st.tuples(_NAMES, _NAMES).map("/".join), max_size=2).map(tuple),
    "dns.upstreams": st.lists(_SERVERS, max_size=3).map(tuple),
    "controller.webhookUrl": st.builds("https://{}:{}".format, _NAMES, _PORTS),
    "agent.kubeletCgroup": st.one_of(st.just(""), _NAMES.map("/{}.slice".format)),
}


def values(option: Option) -> st.SearchStrategy[Any]:
    """What an option may be set to."""
    kind = option.kind
    if option.path in _SPECIAL:
        found = _SPECIAL[option.path]
    elif isinstance(kind, Integer):
        found = st.integers(kind.low, kind.high)
    elif isinstance(kind, Boolean):
        found = st.booleans()
    elif isinstance(kind, Choice):
        found = st.sampled_from(kind.words)
    elif kind.metavar == "HOST:PORT":
        found = _LISTEN
    elif kind.metavar == "PATH":
        found = _PATHS
    else:
        found = _NAMES
    return st.one_of(st.none(), found) if option.default is None else found


CONFIGURED = st.fixed_dictionaries({}, optional={option.path: values(option) for option in OPTIONS})


@hypothesis.settings(max_examples=40, deadline=None)
@given(CONFIGURED)
def test_a_configuration_survives_file_environment_and_flags(chosen: dict[str, Any]) -> None:
    wanted = assemble(chosen)
    file: dict[str, dict[str, Any]] = {}
    for path, value in chosen.items():
        file.setdefault(BY_PATH[path].section, {})[BY_PATH[path].key] = BY_PATH[path].write(value)
    jsonschema.Draft202012Validator(schema()).validate(file)
    found, problems = sources.read_text(yaml.safe_dump(file, allow_unicode=True, sort_keys=False).encode(), "f")
    assert not problems
    assert sources.settled(found).configuration == wanted
    shown, problems = sources.read_text(config.as_file(sources.settled(found).settings).encode(), "f")
    assert not problems
    assert sources.settled(shown).configuration == wanted
    given_values = {path: value for path, value in chosen.items() if value is not None}
    environment = {BY_PATH[path].variables[0]: BY_PATH[path].text(value) for path, value in given_values.items()}
    wanted = assemble(given_values)
    assert settle(argparse.Namespace(), environment).configuration == wanted
    flags = {path: [BY_PATH[path].text(value)] for path, value in given_values.items() if BY_PATH[path].shape == "one"}
    one = assemble({path: value for path, value in given_values.items() if path in flags})
    assert settle(argparse.Namespace(flags=flags), {}).configuration == one


@hypothesis.settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_a_file_holds_it_is_read_or_told(data: bytes) -> None:
    found, problems = sources.read_text(data, "f")
    assert all(problem.startswith("f") for problem in problems)
    if not problems:
        sources.settled(found)
