"""Validation: metadata of every object, and the rules of built-in kinds that people run into."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from vmnet.lab.apiserver import policy_kinds
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import Cause, duplicate, invalid_value, not_allowed, required, unsupported

Object = Mapping[str, Any]

_SUBDOMAIN_TEXT: Final = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_TEXT: Final = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_LABEL_1035_TEXT: Final = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_QUALIFIED_TEXT: Final = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_VALUE_TEXT: Final = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_TEXT: Final = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or "
    "'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
)
_PREFIX_TEXT: Final = "prefix part " + _SUBDOMAIN_TEXT

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAME_PART = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_KEY = re.compile(r"[-._a-zA-Z0-9]+")


def subdomain(name: str) -> list[str]:
    """What is wrong with a DNS subdomain."""
    if len(name) > 253:
        return ["must be no more than 253 characters"] + ([] if _SUBDOMAIN.fullmatch(name) else [_SUBDOMAIN_TEXT])
    return [] if _SUBDOMAIN.fullmatch(name) else [_SUBDOMAIN_TEXT]


def label(name: str) -> list[str]:
    """What is wrong with a DNS label."""
    errors = ["must be no more than 63 characters"] if len(name) > 63 else []
    return errors + ([] if _LABEL.fullmatch(name) else [_LABEL_TEXT])


def label_1035(name: str) -> list[str]:
    """What is wrong with a DNS label that must start with a letter."""
    errors = ["must be no more than 63 characters"] if len(name) > 63 else []
    return errors + ([] if _LABEL_1035.fullmatch(name) else [_LABEL_1035_TEXT])


def path_segment(name: str) -> list[str]:
    """What is wrong with a name that may hold any character but those of a path (RBAC)."""
    if name in (".", ".."):
        return [f"may not be '{name}'"]
    return [f"may not contain '{character}'" for character in ("/", "%") if character in name]


def qualified_name(name: str) -> list[str]:
    """What is wrong with a label key."""
    prefix, slash, part = name.rpartition("/")
    errors: list[str] = []
    if slash:
        if "/" in prefix:
            return [
                "a qualified name must consist of alphanumeric characters, '-', '_' or '.', and must start and end "
                "with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for "
                "validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') with an optional DNS subdomain prefix and "
                "'/' (e.g. 'example.com/MyName')"
            ]
        if not prefix:
            errors.append("prefix part must be non-empty")
        elif not _SUBDOMAIN.fullmatch(prefix):
            errors.append(_PREFIX_TEXT)
    if not part:
        errors.append("name part must be non-empty")
    elif len(part) > 63:
        errors.append("name part must be no more than 63 characters")
    if not _NAME_PART.fullmatch(part):
        errors.append(_QUALIFIED_TEXT)
    return errors


def label_value(value: str) -> list[str]:
    """What is wrong with a label value."""
    errors = ["must be no more than 63 characters"] if len(value) > 63 else []
    return errors + ([] if _VALUE.fullmatch(value) else [_VALUE_TEXT])


def labels(values: Mapping[str, str], field: str) -> list[Cause]:
    """Causes for a map of labels."""
    causes: list[Cause] = []
    for key, value in values.items():
        causes += [invalid_value(field, key, text) for text in qualified_name(key)]
        causes += [invalid_value(field, value, text) for text in label_value(value)]
    return causes


_NAME_RULES: Final[dict[tuple[str, str], Callable[[str], list[str]]]] = {
    ("", "namespaces"): label,
    ("", "services"): label_1035,
    ("", "endpoints"): subdomain,
    **{
        ("rbac.authorization.k8s.io", plural): path_segment
        for plural in ("roles", "rolebindings", "clusterroles", "clusterrolebindings")
    },
}
_STANDARD_FINALIZERS: Final = ("kubernetes", "orphan", "foregroundDeletion")
_ANNOTATIONS_LIMIT: Final = 256 * 1024


def name_errors(info: ResourceInfo, name: str) -> list[str]:
    """What is wrong with an object's name."""
    if info.storage_key == ("networking.k8s.io", "ipaddresses"):
        try:
            canonical = str(ipaddress.ip_address(name))
        except ValueError:
            return ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"]
        return [] if canonical == name else [f'must be in canonical form ("{canonical}")']
    return _NAME_RULES.get(info.storage_key, subdomain)(name)


def metadata(info: ResourceInfo, obj: Object) -> list[Cause]:
    """Causes for an object's metadata."""
    data = obj["metadata"]
    causes: list[Cause] = []
    name, generate = data.get("name", ""), data.get("generateName", "")
    if generate:
        rule = _NAME_RULES.get(info.storage_key, subdomain)
        # What is generated is cut to fit, so only the prefix itself is judged, its trailing hyphen aside.
        masked = generate[:-1] + "a" if generate.endswith("-") else generate
        causes += [invalid_value("metadata.generateName", generate, text) for text in rule(masked)]
    if not name:
        causes.append(required("metadata.name", "name or generateName is required"))
    else:
        causes += [invalid_value("metadata.name", name, text) for text in name_errors(info, name)]
    causes += labels(data.get("labels") or {}, "metadata.labels")
    annotations = data.get("annotations") or {}
    for key in annotations:
        causes += [invalid_value("metadata.annotations", key, text) for text in qualified_name(key.lower())]
    if sum(len(key) + len(value) for key, value in annotations.items()) > _ANNOTATIONS_LIMIT:
        causes.append(
            Cause(
                "FieldValueTooLong",
                f"Too long: may not be more than {_ANNOTATIONS_LIMIT} bytes",
                "metadata.annotations",
            )
        )
    causes += _owners(data.get("ownerReferences") or ())
    for position, finalizer in enumerate(data.get("finalizers") or ()):
        field = f"metadata.finalizers[{position}]"
        causes += [invalid_value(field, finalizer, text) for text in qualified_name(finalizer)]
        if "/" not in finalizer and finalizer not in _STANDARD_FINALIZERS:
            message = "name is neither a standard finalizer name nor is it fully qualified"
            causes.append(invalid_value(field, finalizer, message))
    return causes


_OWNER_ORDER: Final = ("apiVersion", "kind", "name", "uid", "controller", "blockOwnerDeletion")


def _owners(references: Any) -> list[Cause]:
    causes: list[Cause] = []
    controllers: list[str] = []
    for reference in references:
        for name in ("apiVersion", "kind", "name", "uid"):
            if not reference.get(name):
                causes.append(invalid_value(f"metadata.ownerReferences.{name}", "", "must not be empty"))
        if reference.get("controller"):
            controllers.append(f"{reference.get('kind')}/{reference.get('name')}")
    if len(controllers) > 1:
        shown = [{key: item[key] for key in _OWNER_ORDER if key in item} for item in references]
        message = (
            'Only one reference can have Controller set to true. Found "true" in references for '
            f"{controllers[0]} and {controllers[1]}"
        )
        causes.append(invalid_value("metadata.ownerReferences", shown, message))
    return causes


def metadata_update(new: Object, old: Object) -> list[Cause]:
    """Causes for a change of metadata that is not allowed."""
    causes: list[Cause] = []
    after, before = new["metadata"], old["metadata"]
    if before.get("deletionTimestamp"):
        added = [item for item in after.get("finalizers") or () if item not in (before.get("finalizers") or ())]
        if added:
            shown = ", ".join(f'"{item}"' for item in added)
            message = (
                "no new finalizers can be added if the object is being deleted, found new finalizers "
                f"[]string{{{shown}}}"
            )
            causes += [not_allowed("metadata.finalizers", message)] * 2
    if after.get("uid") != before.get("uid"):
        causes += [invalid_value("metadata.uid", after.get("uid", ""), "field is immutable")] * 2
    return causes


def _config_keys(obj: Object) -> list[Cause]:
    causes: list[Cause] = []
    for field in ("data", "binaryData"):
        for key in obj.get(field) or {}:
            if len(key) > 253:
                causes.append(invalid_value(f"{field}[{key}]", key, "must be no more than 253 characters"))
            if not _KEY.fullmatch(key):
                causes.append(invalid_value(f"{field}[{key}]", key, _KEY_TEXT))
    return causes


def _immutable_config(new: Object, old: Object) -> list[Cause]:
    if not old.get("immutable"):
        return []
    message = "field is immutable when `immutable` is set"
    fields = ("data", "binaryData")
    causes = [not_allowed(field, message) for field in fields if (new.get(field) or {}) != (old.get(field) or {})]
    if not new.get("immutable"):
        causes.insert(0, not_allowed("immutable", message))
    return causes


_PROTOCOLS: Final = ("SCTP", "TCP", "UDP")


def _port(value: Any, field: str) -> list[Cause]:
    if isinstance(value, int) and 1 <= value <= 65535:
        return []
    return [invalid_value(field, value, "must be between 1 and 65535, inclusive")]


_PORT_NAME = re.compile(r"[-a-z0-9]+")


def _port_name(value: str, field: str) -> list[Cause]:
    if not _PORT_NAME.fullmatch(value):
        return [invalid_value(field, value, "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")]
    if len(value) > 15:
        return [invalid_value(field, value, "must be no more than 15 characters")]
    if not any(character.isalpha() for character in value):
        return [invalid_value(field, value, "must contain at least one letter (a-z)")]
    return []


def _container(container: Object, field: str, seen: set[str]) -> list[Cause]:
    causes: list[Cause] = []
    name = container.get("name", "")
    if not name:
        causes.append(required(f"{field}.name"))
    else:
        causes += [invalid_value(f"{field}.name", name, text) for text in label(name)]
        if name in seen:
            causes.append(duplicate(f"{field}.name", name))
        seen.add(name)
    if not container.get("image"):
        causes.append(required(f"{field}.image"))
    elif container["image"].strip() != container["image"]:
        message = "must not have leading or trailing whitespace"
        causes.append(invalid_value(f"{field}.image", container["image"], message))
    for position, port in enumerate(container.get("ports") or ()):
        causes += _port(port.get("containerPort"), f"{field}.ports[{position}].containerPort")
        if port.get("protocol") not in _PROTOCOLS:
            causes.append(unsupported(f"{field}.ports[{position}].protocol", port.get("protocol"), _PROTOCOLS))
        if port.get("name"):
            causes += _port_name(port["name"], f"{field}.ports[{position}].name")
    policy = container.get("imagePullPolicy")
    if policy not in ("Always", "IfNotPresent", "Never"):
        causes.append(unsupported(f"{field}.imagePullPolicy", policy, ["Always", "IfNotPresent", "Never"]))
    return causes


def pod_spec(spec: Object, field: str) -> list[Cause]:
    """Causes for the spec of a pod or a template."""
    causes: list[Cause] = []
    volumes = set()
    for position, volume in enumerate(spec.get("volumes") or ()):
        name = volume.get("name", "")
        if not name:
            causes.append(required(f"{field}.volumes[{position}].name"))
        elif name in volumes:
            causes.append(duplicate(f"{field}.volumes[{position}].name", name))
        volumes.add(name)
    seen: set[str] = set()
    if not spec.get("containers"):
        causes.append(required(f"{field}.containers"))
    for kind in ("containers", "initContainers"):
        for position, container in enumerate(spec.get(kind) or ()):
            where = f"{field}.{kind}[{position}]"
            causes += _container(container, where, seen)
            for mount, item in enumerate(container.get("volumeMounts") or ()):
                if item.get("name") not in volumes:
                    message = f'Not found: "{item.get("name")}"'
                    causes.append(Cause("FieldValueNotFound", message, f"{where}.volumeMounts[{mount}].name"))
    if spec.get("restartPolicy") not in ("Always", "OnFailure", "Never"):
        causes.append(
            unsupported(f"{field}.restartPolicy", spec.get("restartPolicy"), ["Always", "OnFailure", "Never"])
        )
    policies = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
    if spec.get("dnsPolicy") not in policies:
        causes.append(unsupported(f"{field}.dnsPolicy", spec.get("dnsPolicy"), policies))
    for name in ("hostname", "subdomain"):
        if spec.get(name):
            causes += [invalid_value(f"{field}.{name}", spec[name], text) for text in label(spec[name])]
    if spec.get("nodeName"):
        causes += [invalid_value(f"{field}.nodeName", spec["nodeName"], text) for text in subdomain(spec["nodeName"])]
    return causes


def _pod(obj: Object) -> list[Cause]:
    return pod_spec(obj.get("spec") or {}, "spec")


_POD_MUTABLE: Final = (
    "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` "
    "(only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was "
    "previously negative)"
)


def _pod_update(new: Object, old: Object) -> list[Cause]:
    def masked(spec: Object) -> dict[str, Any]:
        found = {name: value for name, value in spec.items() if name not in ("activeDeadlineSeconds", "tolerations")}
        for kind in ("containers", "initContainers"):
            if kind in found:
                found[kind] = [{**container, "image": ""} for container in found[kind]]
        if old.get("spec", {}).get("schedulingGates"):
            for name in ("schedulingGates", "nodeSelector", "affinity"):
                found.pop(name, None)
        return found

    if masked(new.get("spec") or {}) == masked(old.get("spec") or {}):
        return []
    message = f"pod updates may not change fields other than {_POD_MUTABLE}"
    return [not_allowed("spec", message)]


def _template(obj: Object) -> list[Cause]:
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    replicas = spec.get("replicas")
    if isinstance(replicas, int) and replicas < 0:
        causes.append(invalid_value("spec.replicas", replicas, "must be greater than or equal to 0"))
    template = spec.get("template") or {}
    selector = spec.get("selector")
    if selector is None:
        causes.append(required("spec.selector"))
    else:
        wanted = selector.get("matchLabels") or {}
        found = (template.get("metadata") or {}).get("labels") or {}
        if any(found.get(key) != value for key, value in wanted.items()):
            message = "`selector` does not match template `labels`"
            causes.append(invalid_value("spec.template.metadata.labels", found, message))
    return causes + pod_spec(template.get("spec") or {}, "spec.template.spec")


def _template_update(new: Object, old: Object) -> list[Cause]:
    after, before = (new.get("spec") or {}).get("selector"), (old.get("spec") or {}).get("selector")
    return [] if after == before else [invalid_value("spec.selector", after, "field is immutable")]


_SET_MUTABLE: Final = (
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
)


def _stateful_set_update(new: Object, old: Object) -> list[Cause]:
    def fixed(obj: Object) -> dict[str, Any]:
        return {name: value for name, value in (obj.get("spec") or {}).items() if name not in _SET_MUTABLE}

    if fixed(new) == fixed(old):
        return []
    names = "', '".join(_SET_MUTABLE[:-1])
    message = f"updates to statefulset spec for fields other than '{names}' and '{_SET_MUTABLE[-1]}' are forbidden"
    return [not_allowed("spec", message)]


_SERVICE_TYPES: Final = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")


def _service(obj: Object) -> list[Cause]:
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    kind = spec.get("type")
    ports = spec.get("ports") or ()
    if not ports and kind != "ExternalName" and spec.get("clusterIP") != "None":
        causes.append(required("spec.ports"))
    names: set[str] = set()
    numbers: set[tuple[Any, Any]] = set()
    for position, port in enumerate(ports):
        field = f"spec.ports[{position}]"
        name = port.get("name", "")
        if not name and len(ports) > 1:
            causes.append(required(f"{field}.name"))
        elif name:
            causes += [invalid_value(f"{field}.name", name, text) for text in label(name)]
            if name in names:
                causes.append(duplicate(f"{field}.name", name))
            names.add(name)
        causes += _port(port.get("port"), f"{field}.port")
        if port.get("protocol") not in _PROTOCOLS:
            causes.append(unsupported(f"{field}.protocol", port.get("protocol"), _PROTOCOLS))
        target = port.get("targetPort")
        causes += (
            _port_name(target, f"{field}.targetPort")
            if isinstance(target, str)
            else _port(target, f"{field}.targetPort")
        )
        number = (port.get("port"), port.get("protocol"))
        if number in numbers and name and not any(cause.field.startswith(field) for cause in causes):
            shown = {
                "Name": "",
                "Protocol": port.get("protocol"),
                "AppProtocol": None,
                "Port": port.get("port"),
                "TargetPort": 0,
                "NodePort": 0,
            }
            causes.append(duplicate(field, shown))
        numbers.add(number)
        if kind == "ClusterIP" and port.get("nodePort"):
            causes.append(not_allowed(f"{field}.nodePort", "may not be used when `type` is 'ClusterIP'"))
    if kind not in _SERVICE_TYPES:
        causes.append(unsupported("spec.type", kind, _SERVICE_TYPES))
    if kind == "ExternalName" and not spec.get("externalName"):
        causes.append(required("spec.externalName"))
    if spec.get("sessionAffinity") not in ("ClientIP", "None"):
        causes.append(unsupported("spec.sessionAffinity", spec.get("sessionAffinity"), ["ClientIP", "None"]))
    causes += labels(spec.get("selector") or {}, "spec.selector")
    for position, address in enumerate(spec.get("externalIPs") or ()):
        causes += ip_address(address, f"spec.externalIPs[{position}]")
    return causes


def ip_address(text: Any, field: str) -> list[Cause]:
    """Causes for an address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return [invalid_value(field, text, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)")]
    return []


def _event(obj: Object) -> list[Cause]:
    namespace = (obj.get("involvedObject") or {}).get("namespace", "")
    own = obj["metadata"].get("namespace", "")
    if namespace == own or (not namespace and own in ("default", "kube-system")):
        return []
    return [invalid_value("involvedObject.namespace", namespace, "does not match event.namespace")]


_NOTE_LIMIT: Final = 1024
_NEW_FIELDS: Final = {"note": "message", "regarding": "involvedObject"}


def new_event(obj: Object, old: Object | None) -> list[Cause]:
    """Causes for an events.k8s.io/v1 Event; fields are named as in core/v1, as the real server does."""
    namespace = (obj.get("regarding") or {}).get("namespace", "")
    own = obj["metadata"].get("namespace", "")
    causes: list[Cause] = []
    if namespace != own and (namespace or own not in ("default", "kube-system")):
        causes.append(invalid_value("involvedObject.namespace", namespace, "does not match event.namespace"))
    if not obj.get("eventTime"):
        causes.append(required("eventTime"))
    if (obj.get("type") or "") not in ("Normal", "Warning"):
        causes.append(invalid_value("type", "", f"has invalid value: {obj.get('type') or ''}"))
    controller = obj.get("reportingController") or ""
    if not controller:
        causes.append(required("reportingController"))
    causes += [invalid_value("reportingController", controller, text) for text in qualified_name(controller)]
    causes += [required(name) for name in ("reportingInstance", "action", "reason") if not obj.get(name)]
    if len((obj.get("note") or "").encode()) > _NOTE_LIMIT:
        causes.append(invalid_value("message", "", f"can have at most {_NOTE_LIMIT} characters"))
    if obj.get("deprecatedCount") and old is None:
        causes.append(invalid_value("count", "", "needs to be unset"))
    series = obj.get("series")
    if series is not None and int(series.get("count") or 0) < 2:
        causes.append(invalid_value("series.count", "", "should be at least 2"))
    if old is not None:
        for name in ("regarding", "reason", "reportingController", "reportingInstance", "action", "note", "type"):
            if obj.get(name) != old.get(name):
                field = _NEW_FIELDS.get(name, name)
                causes.append(invalid_value(field, obj.get(name), "field is immutable"))
    return causes


def _node_update(new: Object, old: Object) -> list[Cause]:
    before, after = (old.get("spec") or {}).get("podCIDRs"), (new.get("spec") or {}).get("podCIDRs")
    if before and before != after:
        return [not_allowed("spec.podCIDRs", 'node updates may not change podCIDR except from "" to valid')]
    return []


_CREATE: Final[dict[tuple[str, str], Callable[[Object], list[Cause]]]] = {
    ("", "configmaps"): _config_keys,
    ("", "secrets"): _config_keys,
    ("", "pods"): _pod,
    ("", "services"): _service,
    ("", "events"): _event,
    ("apps", "deployments"): _template,
    ("apps", "replicasets"): _template,
    ("apps", "statefulsets"): _template,
    ("apps", "daemonsets"): _template,
}
_UPDATE: Final[dict[tuple[str, str], Callable[[Object, Object], list[Cause]]]] = {
    ("", "configmaps"): _immutable_config,
    ("", "secrets"): _immutable_config,
    ("", "pods"): _pod_update,
    ("", "nodes"): _node_update,
    ("apps", "deployments"): _template_update,
    ("apps", "replicasets"): _template_update,
    ("apps", "daemonsets"): _template_update,
    ("apps", "statefulsets"): _stateful_set_update,
}


def created(storage: tuple[str, str], obj: Object) -> list[Cause]:
    """Causes for a new object of a built-in kind; ``storage`` is (group, plural)."""
    rule = _CREATE.get(storage) or policy_kinds.CREATE.get(storage)
    return rule(obj) if rule else []


def changed(storage: tuple[str, str], new: Object, old: Object) -> list[Cause]:
    """Causes for a change of an object of a built-in kind."""
    rule = _UPDATE.get(storage) or policy_kinds.UPDATE.get(storage)
    causes = rule(new, old) if rule else []
    create = _CREATE.get(storage) or policy_kinds.CREATE.get(storage)
    # A pod's own rules need not hold again: its mutable fields are few.
    return causes + (create(new) if create and storage != ("", "events") else [])
