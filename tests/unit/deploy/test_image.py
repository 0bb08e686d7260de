"""The Containerfile, as far as it can be told without an engine: what it names exists, and is what the project says."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
CONTAINERFILE = ROOT / "Containerfile"
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "LABEL", "ENV", "USER", "ENTRYPOINT"}


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def project() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_it_is_plain() -> None:
    # No HEALTHCHECK (Kubernetes asks its own way), no ADD of something from the network.
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert not re.search(r"curl|wget|https?://|--mount|--network", CONTAINERFILE.read_text())


def test_the_base_is_pinned_by_version() -> None:
    (base,) = of("ARG")
    assert re.fullmatch(r"BASE=[\w./-]+:\d+\.\d+-slim", base)
    assert all(rest.startswith("${BASE}") for rest in of("FROM"))


@pytest.mark.skipif(not (ROOT / "vmnet/cni/shim.c").exists(), reason="the shim's source is not in this tree yet")
def test_every_source_exists_and_is_sent_to_the_builder() -> None:
    sent = [line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")]
    stages = {rest.split(" AS ")[1] for rest in of("FROM") if " AS " in rest}
    for rest in of("COPY"):
        *sources, _ = rest.split()
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in sent, source


def test_the_wheel_that_is_built_there_needs_nothing_that_is_not_copied() -> None:
    copied = {source for rest in of("COPY") for source in rest.split()[:-1]}
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {found["project"]["readme"], *found["project"]["license-files"], "pyproject.toml"}
    needed |= {name.split("/")[0] for name in found["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert needed <= copied


def test_everything_that_pip_installs_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    waiting = [Requirement(text) for text in project()["dependencies"]]
    for requirement in waiting:
        assert str(requirement.specifier) == f"=={pinned[normal(requirement.name)]}"
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if normal(requirement.name) in seen:
            continue
        seen.add(normal(requirement.name))
        for text in importlib.metadata.distribution(requirement.name).requires or []:
            needed = Requirement(text)
            extras = {"", *requirement.extras}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    assert seen == pinned.keys()
    (install,) = [rest for rest in of("RUN") if "pip install" in rest]
    assert "--constraint /src/constraints.txt" in install


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_versions_agree() -> None:
    version = str(project()["version"])
    assert f'org.opencontainers.image.version="{version}"' in of("LABEL")[0]
    (image,) = yaml.safe_load((ROOT / "deploy" / "base" / "kustomization.yaml").read_text())["images"]
    assert image["newTag"] == version


def test_the_user_is_the_controllers() -> None:
    (user,) = of("USER")
    manifest = yaml.safe_load((ROOT / "deploy" / "controller" / "deployment.yaml").read_text())
    context = manifest["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_the_programs_that_the_kernel_seam_calls_are_installed() -> None:
    packages = {"ip": "iproute2", "bridge": "iproute2", "nft": "nftables", "nsenter": "util-linux"}
    called: set[str] = set()
    for path in (ROOT / "vmnet" / "kernel").glob("*.py"):
        called |= set(re.findall(r'[\[(]"(ip|bridge|nft|nsenter|tc|conntrack|sysctl)"', path.read_text()))
    last = of("RUN")[-1].split()
    assert {packages.get(name, name) for name in called} <= set(last)
