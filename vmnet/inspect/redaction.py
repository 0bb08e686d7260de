"""Taking out of objects and texts what must not leave a cluster. Pure.

Redaction errs on the side of too much: a name that sounds like a secret's is enough. What was taken out is replaced by
``[redacted]``, so that its place can be seen.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from vmnet.kube.api import Object

REDACTED: Final = "[redacted]"
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
"""A second copy of the object, as text."""
_WORDS: Final = (
    r"pass(?:word|wd|phrase)?|pwd|secret|token|credentials?|private[-_]?key|(?:api|access|signing|encryption)[-_]?key"
    r"|client-key(?:-data)?|client-certificate-data|authorization|bearer|cookie|connection[-_]?string|dsn"
    r"|(?:user|network|vendor)[-_]?data(?:[-_]?base64)?|chpasswd|ssh[-_]?authorized[-_]?keys?|psk|otp"
)
_SECRET_NAME: Final = re.compile(rf"(?:^|[^a-z]|(?<=[a-z])(?=[A-Z]))(?:{_WORDS})(?:$|[^a-z])", re.IGNORECASE)
_PLAIN_NAME: Final = re.compile(
    r"(?:name|names|ref|refs|reference|path|seconds|type|kind|class|namespace|file|mount|version|policy|count|enabled"
    r"|service-?account-?token|secrets|tokens)$",
    re.IGNORECASE,
)
"""Of such names those that only say where a secret is, or how long it lives."""
_ENVIRONMENTS_WHOLE: Final = frozenset({"STANDALONE_VMI"})
"""KubeVirt's launcher gets the whole machine by this variable, with its cloud-init."""
_TEXT_RULES: Final = (
    (
        re.compile(r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL),
        REDACTED,
    ),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"), REDACTED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {REDACTED}"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:\"']+:[^\s/@\"']+@", re.IGNORECASE), rf"\1{REDACTED}@"),
    # name: value, name=value, "name": "value", --name value; also with quotes that JSON has escaped
    (
        re.compile(
            rf"((?<![A-Za-z])(?:[A-Za-z0-9]+[-_.])*(?:{_WORDS})(?:[-_.][A-Za-z0-9]+)*)"
            r"(\\*[\"']?\s*[:=]\s*|\s+(?=\S*\d))(\\*[\"'](?:[^\"'\\]|\\+[^\"'])*\\*[\"']|[^\s\"',;}\]]+)",
            re.IGNORECASE,
        ),
        None,
    ),
)
_QUOTED: Final = re.compile(r"(\\*[\"']).*?(\\*[\"'])", re.DOTALL)


def redact_object(item: Object) -> Object:
    """A Kubernetes object without secrets and without ``managedFields``; of a Secret names and keys remain."""
    found: Object = {key: value for key, value in item.items() if key not in ("data", "stringData", "binaryData")}
    metadata = dict(item.get("metadata") or {})
    metadata.pop("managedFields", None)
    annotations = dict(metadata.get("annotations") or {})
    if _LAST_APPLIED in annotations:
        annotations[_LAST_APPLIED] = REDACTED
        metadata["annotations"] = annotations
    result: Object = {**_redacted(found), "metadata": _redacted(metadata)}
    for part in ("data", "stringData", "binaryData"):
        content = item.get(part)
        if not isinstance(content, Mapping):
            continue
        if item.get("kind") == "Secret":
            result[part] = dict.fromkeys(content, REDACTED)
        else:
            result[part] = _redacted(content)
    return result


def _redacted(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        if isinstance(value.get("name"), str) and "value" in value and _secret(value["name"]):
            # An environment variable, or a parameter.
            return {**value, "value": REDACTED}
        return {key: _redacted(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(entry, name) for entry in value]
    if isinstance(value, str):
        return REDACTED if value and _secret(name) else redact_text(value)
    return value


def _secret(name: str) -> bool:
    return name in _ENVIRONMENTS_WHOLE or (_SECRET_NAME.search(name) is not None and _PLAIN_NAME.search(name) is None)


def redact_text(text: str) -> str:
    """A log, a metric's text or an output without what looks like a credential."""
    for pattern, replacement in _TEXT_RULES:
        text = pattern.sub(replacement if replacement is not None else _without_value, text)
    return text


def _without_value(match: re.Match[str]) -> str:
    name, separator, value = match.groups()
    if _PLAIN_NAME.search(name) is not None or value.strip("\\\"'") in ("", "null", "true", "false", REDACTED):
        return match.group()
    if not separator.strip("\\\"' \t\n") and not name.startswith("-"):
        # Prose ("token 17 expired") unless it is an option's name.
        return match.group()
    # Quotes stay, so that JSON stays JSON.
    quoted = _QUOTED.fullmatch(value)
    return f"{name}{separator}" + (f"{quoted[1]}{REDACTED}{quoted[2]}" if quoted is not None else REDACTED)
