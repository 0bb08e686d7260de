"""The manifests of ``deploy/`` as users get them: rendered by kubectl's kustomize.

``python -m vmnet.lab.manifests FILE`` writes the single-file install.
"""

import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.lab import kubectl
from vmnet.lab.errors import LabError

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
INSTALL: Final = DEPLOY / "install.yaml"
_HEAD: Final = "# kubectl apply --server-side -f install.yaml\n# Made from the manifests beside it by: make manifests\n"
_SECONDS: Final = 60


def rendered(folder: Path = DEPLOY) -> str:
    """What ``kubectl kustomize`` makes of a folder. Raises LabError."""
    argv = [str(kubectl.find()), "kustomize", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise LabError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """The objects in a YAML text."""
    return [item for item in yaml.load_all(text, Loader=yaml.CSafeLoader) if item]


def rights(account: str) -> Iterator[tuple[str, str, str, str]]:
    """What the roles of a service account grant: verb, group, resource, and a name where only that one is granted."""
    found = documents(rendered())
    roles = {(item["kind"], item["metadata"]["name"]): item["rules"] for item in found if "rules" in item}
    for item in found:
        if account not in [subject["name"] for subject in item.get("subjects") or ()]:
            continue
        for rule in roles[item["roleRef"]["kind"], item["roleRef"]["name"]]:
            names = rule.get("resourceNames") or [""]
            yield from product(rule["verbs"], rule["apiGroups"], rule["resources"], names)


def main() -> None:
    """Write the single-file install."""
    Path(sys.argv[1]).write_text(_HEAD + rendered())


if __name__ == "__main__":
    main()
