"""The Containerfile, as far as it can be told without an engine: what it names exists, and is what the project says."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from vmnet.cni.chain import PLUGIN

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


def run(*words: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_what_is_copied_suffices_to_build_install_and_start(tmp_path: Path) -> None:
    """The steps of the stage ``packages``, without the network: what it would fetch is this environment's."""
    source, site = tmp_path / "src", tmp_path / "site"
    for rest in of("COPY"):
        *sources, target = rest.split()
        for name in sources:
            if not target.startswith("/src") or name.startswith("--"):
                continue
            # A file or, of a directory, what is in it.
            where = source / target.removeprefix("/src").strip("/")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, where, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                where = where / name if target.endswith("/") else where
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, where)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build["requires"] == [f"hatchling=={importlib.metadata.version('hatchling')}"]
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist"), cwd=source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel))
    run(sys.executable, *pip, cwd=tmp_path)
    for program in ("agent", "controller"):
        code = f"import sys, vmnet.cmd.main as m; print(m.__file__); sys.argv[1:] = ['{program}', '--help']; m.main()"
        told = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
        assert told.startswith(str(site))
        assert "--kubeconfig" in told
    written = {path.relative_to(site) for path in site.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    there = {
        path.relative_to(ROOT)
        for path in (ROOT / "vmnet").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there <= written


def test_the_plugin_is_built_as_the_image_builds_it(tmp_path: Path) -> None:
    (line,) = [rest for rest in of("RUN") if rest.startswith("musl-gcc")]
    words = line.replace("/src/shim.c", str(ROOT / "vmnet/cni/shim.c")).replace("/vmnet-cni", str(tmp_path / "plugin"))
    run(*words.split(), cwd=tmp_path)
    told = run(str(tmp_path / "plugin"), cwd=tmp_path, CNI_COMMAND="VERSION")
    assert "1.1.0" in json.loads(told)["supportedVersions"]
    (copy,) = [rest for rest in of("COPY") if rest.startswith("--from=shim")]
    # The agent looks for it there (``agent.conflist.shim``): the image's environment is /opt/vmnet.
    assert copy.split()[-1] == f"/opt/vmnet/libexec/{PLUGIN}"


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
