"""What is made from the code: reference documents, and the rules as the Prometheus operator takes them.

``python -m vmnet.lab.references`` writes them; a test tells when one is not current.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from prometheus_client.metrics import MetricWrapperBase

from vmnet import metrics
from vmnet.lab.manifests import DEPLOY, documents
from vmnet.model import configuration

ROOT: Final = DEPLOY.parent
DOCUMENTS: Final = ROOT / "docs"
MONITORING: Final = DEPLOY / "overlays" / "monitoring"
RULES: Final = MONITORING / "rules.yaml"
_MADE: Final = "made by `make references`"
_NAMES: Final = ROOT / "vmnet" / "model" / "names.py"
_COMPONENTS: Final = ("agent", "controller")
_OBJECT_NAMES: Final = ("_ANNOTATION", "_LABEL", "_FINALIZER")
_OF_ALL: Final = ("| `apiVersion`", "| `kind`", "| `metadata`")
_SAMPLES: Final = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
    "info": ("_info",),
}


def main() -> None:
    """Write them all."""
    for path, text in made().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def made() -> dict[Path, str]:
    """Every file that is made from the code, with its text."""
    return {
        MONITORING / "prometheus-rule.yaml": prometheus_rule(),
        DOCUMENTS / "metrics.md": metrics_reference(),
        DOCUMENTS / "reference" / "crds.md": definitions_reference(),
        DOCUMENTS / "reference" / "annotations.md": annotations_reference(),
        DOCUMENTS / "reference" / "configuration.md": configuration_reference(),
    }


def configuration_reference() -> str:
    """What can be decided, and by which key, flag and variable."""
    return (
        f"# Configuration\n\n({_MADE})\n\nA value comes from the first of: flag, environment variable, file"
        " (`--config`, `$VMNET_CONFIG`), default. `vmnet config show` tells who decided each.\n\n"
    ) + configuration.reference()


# Monitoring


def prometheus_rule() -> str:
    """``rules.yaml`` as an object of the Prometheus operator."""
    body = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vmnet", "namespace": "vmnet-system"},
        "spec": yaml.safe_load(RULES.read_text()),
    }
    return f"# Of rules.yaml, {_MADE}.\n" + yaml.safe_dump(body, sort_keys=False, width=120)


def samples() -> dict[str, frozenset[str]]:
    """Name of every series that our processes show → its labels, without those that Prometheus adds by target."""
    found = {}
    for name, kind, _, labels in _families():
        for suffix in _SAMPLES[kind]:
            found[name + suffix] = frozenset({*labels, *(("le",) if suffix == "_bucket" else ())})
    return found


def _families() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Name, type, help and labels of each metric family of the registry."""
    collectors = list(metrics.REGISTRY._collector_to_names)
    for collector in collectors:
        if isinstance(collector, MetricWrapperBase):
            (family,) = collector.describe()
            labels = ("version",) if collector is metrics.BUILD else tuple(collector._labelnames)
            yield family.name, family.type, family.documentation, labels
        else:
            for family in collector.collect():
                yield family.name, family.type, family.documentation, tuple(getattr(family, "_labelnames", ()))


def _served_by() -> dict[str, tuple[str, ...]]:
    """Metric family → the components whose code names it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in vars(metrics).items():
        if not isinstance(value, MetricWrapperBase):
            continue
        (family,) = value.describe()
        places = [
            component
            for component in _COMPONENTS
            for path in (*(ROOT / "vmnet" / component).glob("*.py"), ROOT / "vmnet" / "cmd" / f"{component}.py")
            if re.search(rf"\bmetrics\.{name}\b", path.read_text())
        ]
        found[family.name] = tuple(dict.fromkeys(places))
    return found


def metrics_reference() -> str:
    """``docs/metrics.md``."""
    served = _served_by()
    rows = []
    others = []
    for name, kind, text, labels in sorted(_families()):
        full = name + ("_total" if kind == "counter" else "_info" if kind == "info" else "")
        if not name.startswith("vmnet_"):
            others.append(f"| `{full}` | {kind} | {text} |")
            continue
        by = "agent" if name.startswith("vmnet_dns_") else " and ".join(served.get(name, ())) or "agent and controller"
        rows.append(f"| `{full}` | {kind} | {', '.join(f'`{label}`' for label in labels) or '—'} | {by} | {text} |")
    rules = yaml.safe_load(RULES.read_text())["groups"]
    recorded = [f"| `{rule['record']}` |" for group in rules for rule in group["rules"] if "record" in rule]
    alerts = [
        f"| [{rule['alert']}](runbooks/{rule['alert']}.md) | {rule['labels']['severity']} | {rule.get('for', '0m')} |"
        f" {_without_templates(rule['annotations']['summary'])} |"
        for group in rules
        for rule in group["rules"]
        if "alert" in rule
    ]
    return _text(
        "# Metrics and alerts",
        f"Of `vmnet/metrics.py` and `deploy/overlays/monitoring/rules.yaml`, {_MADE}.",
        "Agents serve `/metrics` on port 9465 of their node, controllers on port 9411. `namespace`, `name`, `node`\n"
        "and `network` are the machine, the node it came to and its network, so that these series join with\n"
        "`kubevirt_vmi_migration_*`. Scrape with `honor_labels`, or Prometheus renames them.",
        "## Of vmnet",
        "\n".join(("| metric | type | labels | served by | what it says |", "|---|---|---|---|---|", *rows)),
        "## Of the processes",
        "\n".join(("| metric | type | what it says |", "|---|---|---|", *others)),
        "## Recording rules",
        "\n".join(("| series |", "|---|", *recorded)),
        "## Alerts",
        "\n".join(("| alert | severity | after | what it says |", "|---|---|---|---|", *alerts)),
    )


def _without_templates(text: str) -> str:
    return re.sub(r"{{ \$labels\.(\w+) }}", r"*\1*", text)


# Custom resources


def definitions_reference() -> str:
    """``docs/reference/crds.md``."""
    parts = ["# Custom resources", f"Of `deploy/crds`, {_MADE}."]
    for path in sorted((DEPLOY / "crds").glob("*_*.yaml")):
        for item in documents(path.read_text()):
            parts += _definition(item)
    return _text(*parts)


def _definition(item: Mapping[str, Any]) -> Iterator[str]:
    spec = item["spec"]
    short = ", ".join(f"`{name}`" for name in spec["names"].get("shortNames") or ())
    yield f"## {spec['names']['kind']}"
    for version in spec["versions"]:
        schema = version["schema"]["openAPIV3Schema"]
        scope = "in a namespace" if spec["scope"] == "Namespaced" else "of the cluster"
        head = f"`{spec['group']}/{version['name']}`, {scope}; `kubectl get {spec['names']['plural']}`"
        yield head + (f" ({short})." if short else ".")
        if "description" in schema:
            yield str(schema["description"])
        columns = version.get("additionalPrinterColumns") or []
        if columns:
            yield f"Columns: {', '.join(column['name'] for column in columns)}."
        rows = [
            row for row in _fields("", schema) if not row.startswith(("| `apiVersion`", "| `kind`", "| `metadata`"))
        ]
        yield "\n".join(("| field | type | what it says |", "|---|---|---|", *rows))


def _fields(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required") or ()
    for name, field in (schema.get("properties") or {}).items():
        inner = f"{path}.{name}" if path else name
        yield _field(inner, field, name in required)
        yield from _below(inner, field)


def _below(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from _fields(path, schema)
    items = schema.get("items")
    if isinstance(items, Mapping):
        yield from _below(f"{path}[]", items)


def _field(path: str, schema: Mapping[str, Any], required: bool) -> str:
    kind = schema.get("type", "any")
    if kind == "array":
        kind = f"list of {(schema.get('items') or {}).get('type', 'any')}"
    said = [str(schema.get("description", "")).strip()]
    if required:
        said.append("Required.")
    if "enum" in schema:
        said.append(f"One of {', '.join(f'`{value}`' for value in schema['enum'])}.")
    if "default" in schema:
        said.append(f"Default: `{schema['default']}`.")
    for name, text in (("minimum", "At least"), ("maximum", "At most")):
        if name in schema:
            said.append(f"{text} {schema[name]}.")
    for name, text in (("minItems", "At least"), ("maxItems", "At most")):
        if name in schema:
            said.append(f"{text} {schema[name]} items.")
    text = " ".join(part for part in said if part).replace("|", "\\|").replace("\n", " ")
    return f"| `{path}` | {kind} | {text} |"


# Annotations, labels, finalizers


def annotations_reference() -> str:
    """``docs/reference/annotations.md``. Raises ValueError when one is not explained."""
    rows = []
    body = ast.parse(_NAMES.read_text()).body
    for statement, follower in zip(body, [*body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        kind = next((end for end in _OBJECT_NAMES if statement.target.id.endswith(end)), None)
        if kind is None or not isinstance(statement.value, ast.Constant):
            continue
        if not (
            isinstance(follower, ast.Expr)
            and isinstance(follower.value, ast.Constant)
            and isinstance(follower.value.value, str)
        ):
            raise ValueError(f"{_NAMES.name}: {statement.target.id} is not explained")
        text = " ".join(follower.value.value.replace("``", "`").split())
        rows.append(f"| `{statement.value.value!s}` | {kind[1:].lower()} | {text} |")
    return _text(
        "# Annotations, labels and finalizers",
        f"Of `vmnet/model/names.py`, {_MADE}.",
        "\n".join(("| name | kind | what it says |", "|---|---|---|", *sorted(rows))),
    )


def _text(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
