"""Admission webhooks: who is asked about a write, what is sent, and what the answers do to it.

As recorded from the real server: mutating webhooks first, one after another, each with what those before it made of the
object; then the validating ones, all at once. ``reinvocationPolicy`` is not evaluated.
"""

import asyncio
import base64
import binascii
import copy
import json
import ssl
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from vmnet.lab.apiserver import patches, selectors
from vmnet.lab.apiserver.authentication import User
from vmnet.lab.apiserver.cel import EvaluationError, compiled
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Object, Store

GROUP: Final = "admissionregistration.k8s.io"
_NAMESPACES: Final = ("", "namespaces")
_SERVICES: Final = ("", "services")
_SLICES: Final = ("discovery.k8s.io", "endpointslices")
_DEFAULT_TIMEOUT: Final = 10
_DEFAULT_PORT: Final = 443
_OWN: Final = frozenset({"mutatingwebhookconfigurations", "validatingwebhookconfigurations"})
"""Never sent to webhooks: a bad one could not be removed."""
CONDITION_NAMES: Final = frozenset({"object", "oldObject", "request"})
"""What expressions of ``matchConditions`` may speak of."""
_HEADERS: Final = {"Accept": "application/json, */*", "User-Agent": "kube-apiserver-admission"}


class Phase(StrEnum):
    """Plural of the configurations that are asked."""

    MUTATING = "mutatingwebhookconfigurations"
    VALIDATING = "validatingwebhookconfigurations"


@dataclass(frozen=True, slots=True)
class Asked:
    """The write that webhooks are asked about. ``options``: its CreateOptions, UpdateOptions, …, as JSON."""

    info: ResourceInfo
    namespace: str
    name: str
    subresource: str
    operation: str
    user: User
    dry_run: bool
    options: Mapping[str, Any]


class _CallFailed(Exception):
    """A webhook was not reached, or what it said cannot be read: its failure policy decides."""


class Admission:
    """Asks the webhooks that are configured in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._session: aiohttp.ClientSession | None = None
        self._contexts: dict[str, ssl.SSLContext] = {}

    async def close(self) -> None:
        """Give up the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def concerns(self, info: ResourceInfo, operation: str, subresource: str = "") -> bool:
        """Whether any webhook's rules name such a write."""
        return any(_ruled(hook, info, operation, subresource) for phase in Phase for hook in self._hooks(phase, info))

    async def mutate(self, asked: Asked, obj: Object | None, old: Object | None, warnings: list[str]) -> list[Any]:
        """Operations of RFC 6902 that the mutating webhooks want, in order. Raises ApiError."""
        found: list[Any] = []
        for hook in self._matching(Phase.MUTATING, asked, obj, old):
            operations = await self._ask(hook, asked, obj, old, warnings)
            if not operations:
                continue
            if obj is None:
                text = f'admission webhook "{hook["name"]}" attempted to modify the object, '
                raise _internal(text + "which is not supported for this operation")
            obj = applied(obj, operations)
            found += operations
        return found

    async def validate(self, asked: Asked, obj: Object | None, old: Object | None, warnings: list[str]) -> None:
        """Ask the validating webhooks. Raises ApiError."""
        hooks = self._matching(Phase.VALIDATING, asked, obj, old)
        answers = [self._ask(hook, asked, obj, old, warnings) for hook in hooks]
        results = await asyncio.gather(*answers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _hooks(self, phase: Phase, info: ResourceInfo) -> Iterable[Mapping[str, Any]]:
        if info.group == GROUP and info.plural in _OWN:
            return
        for stored in sorted(self._store.items((GROUP, phase.value)), key=lambda item: item.obj["metadata"]["name"]):
            yield from stored.obj.get("webhooks") or []

    def _matching(self, phase: Phase, asked: Asked, obj: Object | None, old: Object | None) -> list[Mapping[str, Any]]:
        found = []
        for hook in self._hooks(phase, asked.info):
            ruled_here = _ruled(hook, asked.info, asked.operation, asked.subresource)
            if ruled_here and self._selected(hook, asked, obj, old) and _conditions_hold(hook, asked, obj, old):
                found.append(hook)
        return found

    def _selected(self, hook: Mapping[str, Any], asked: Asked, obj: Object | None, old: Object | None) -> bool:
        wanted = selectors.from_object(hook.get("objectSelector"))
        if not any(selectors.matches_labels(wanted, item) for item in (obj, old) if item is not None):
            return False
        of_namespace = selectors.from_object(hook.get("namespaceSelector"))
        if asked.info.storage_key == _NAMESPACES:
            place = obj or old
        elif asked.info.namespaced:
            stored = self._store.get(_NAMESPACES, ("", asked.namespace))
            place = stored.obj if stored is not None else {"metadata": {}}
        else:
            return True
        return place is not None and selectors.matches_labels(of_namespace, place)

    async def _ask(
        self, hook: Mapping[str, Any], asked: Asked, obj: Object | None, old: Object | None, warnings: list[str]
    ) -> list[Any]:
        """Operations that one webhook wants. Raises ApiError: it denies, or could not be asked and must be."""
        request = review_request(asked, obj, old)
        name = hook["name"]
        try:
            response = await self._call(hook, request)
            operations = _operations(response)
        except _CallFailed as error:
            if hook.get("failurePolicy") == "Ignore":
                return []
            raise _internal(f'failed calling webhook "{name}": {error}') from error
        warnings += [str(item) for item in response.get("warnings") or []]
        if not response.get("allowed"):
            raise _denied(name, response.get("status") or {})
        return operations

    async def _call(self, hook: Mapping[str, Any], request: Object) -> Mapping[str, Any]:
        review = {"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": request}
        seconds = hook.get("timeoutSeconds") or _DEFAULT_TIMEOUT
        config = hook.get("clientConfig") or {}
        url, server_name = self._where(config)
        url = f"{url}?timeout={seconds}s"
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        try:
            context = self._context(str(config.get("caBundle") or ""))
            posting = self._session.post(
                url,
                json=review,
                headers=_HEADERS,
                ssl=context,
                server_hostname=server_name,
                timeout=aiohttp.ClientTimeout(total=seconds),
            )
            async with posting as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise _CallFailed(f"the server responded with the status code {answer.status}")
        except TimeoutError as error:
            raise _CallFailed(f'failed to call webhook: Post "{url}": context deadline exceeded') from error
        except aiohttp.ClientConnectorError as error:
            parts = urlsplit(url)
            reason = "connection refused" if isinstance(error.os_error, ConnectionRefusedError) else str(error)
            text = f"dial tcp {parts.hostname}:{parts.port}: connect: {reason}"
            raise _CallFailed(f'failed to call webhook: Post "{url}": {text}') from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _CallFailed(f'failed to call webhook: Post "{url}": {error}') from error
        return _response(body, request["uid"])

    def _context(self, bundle: str) -> ssl.SSLContext:
        found = self._contexts.get(bundle)
        if found is None:
            pem = base64.b64decode(bundle, validate=True).decode() if bundle else None
            found = self._contexts[bundle] = ssl.create_default_context(cadata=pem or None)
        return found

    def _where(self, config: Mapping[str, Any]) -> tuple[str, str | None]:
        """URL of a webhook, and the name in its certificate where that is not the URL's."""
        if config.get("url"):
            return str(config["url"]), None
        service = config.get("service") or {}
        namespace, name = str(service.get("namespace")), str(service.get("name"))
        stored = self._store.get(_SERVICES, (namespace, name))
        if stored is None:
            raise _CallFailed(f'failed to call webhook: service "{name}" not found')
        port = service.get("port") or _DEFAULT_PORT
        found = next((item for item in stored.obj["spec"].get("ports") or [] if item["port"] == port), None)
        for found_slice in self._store.items(_SLICES):
            metadata = found_slice.obj["metadata"]
            if metadata.get("namespace") != namespace or found is None:
                continue
            if (metadata.get("labels") or {}).get("kubernetes.io/service-name") != name:
                continue
            number = next(
                (item["port"] for item in found_slice.obj.get("ports") or [] if item.get("name") == found.get("name")),
                None,
            )
            for endpoint in found_slice.obj.get("endpoints") or []:
                if number is not None and (endpoint.get("conditions") or {}).get("ready") is not False:
                    address = endpoint["addresses"][0]
                    host = f"[{address}]" if ":" in address else address
                    return f"https://{host}:{number}{service.get('path') or '/'}", f"{name}.{namespace}.svc"
        raise _CallFailed(f'failed to call webhook: no endpoints available for service "{name}"')


def applied(obj: Object, operations: Iterable[Any]) -> Object:
    """The object with a webhook's patch. Raises ApiError (500)."""
    found: Any = copy.deepcopy(obj)
    for operation in operations:
        try:
            found = patches.json_patch(found, [operation])
        except (ApiError, KeyError, TypeError) as error:
            path, kind = operation.get("path"), operation.get("op")
            raise _internal(f"{kind} operation does not apply: doc is missing path: {path}: missing value") from error
    if not isinstance(found, dict):
        raise _internal("the patched object is no object")
    return found


def conditions_met(conditions: Iterable[Mapping[str, str]], evaluate: Callable[[str], Any]) -> bool:
    """Whether all ``matchConditions`` hold. One that does not decides, whatever others fail to say.

    Raises EvaluationError, with the expression, where none decides and one cannot be evaluated.
    """
    failure: EvaluationError | None = None
    for condition in conditions:
        try:
            if evaluate(condition["expression"]) is not True:
                return False
        except EvaluationError as error:
            text = f"expression '{condition['expression']}' resulted in error: {error}"
            failure = failure or EvaluationError(text)
    if failure is not None:
        raise failure
    return True


def _conditions_hold(hook: Mapping[str, Any], asked: Asked, obj: Object | None, old: Object | None) -> bool:
    """Whether a webhook is to be asked. Raises ApiError where that cannot be said of one that must be."""
    conditions = hook.get("matchConditions") or ()
    if not conditions:
        return True
    variables = {"object": obj, "oldObject": old, "request": review_request(asked, obj, old)}
    try:
        return conditions_met(conditions, lambda source: compiled(source, CONDITION_NAMES).evaluate(variables))
    except EvaluationError as error:
        if hook.get("failurePolicy") == "Ignore":
            return False
        text = f'failed to evaluate match conditions of webhook "{hook["name"]}": {error}'
        raise _internal(text) from error


def _ruled(hook: Mapping[str, Any], info: ResourceInfo, operation: str, subresource: str) -> bool:
    return ruled(hook.get("rules") or [], info, operation, subresource)


def ruled(rules: Iterable[Mapping[str, Any]], info: ResourceInfo, operation: str, subresource: str) -> bool:
    """Whether one of the rules (of a webhook or a policy) names such a write."""
    named = {info.plural, "*"} if not subresource else {f"{info.plural}/{subresource}", f"{info.plural}/*"}
    named |= {"*/*"} | ({f"*/{subresource}"} if subresource else set())
    for rule in rules:
        scope = rule.get("scope") or "*"
        if scope != "*" and (scope == "Namespaced") is not info.namespaced:
            continue
        if (
            {operation, "*"} & set(rule.get("operations") or ())
            and {info.group, "*"} & set(rule.get("apiGroups") or ())
            and {info.version, "*"} & set(rule.get("apiVersions") or ())
            and named & set(rule.get("resources") or ())
        ):
            return True
    return False


def review_request(asked: Asked, obj: Object | None, old: Object | None) -> Object:
    """``request`` of an AdmissionReview, which is also what policies see of it."""
    info = asked.info
    kind = {"group": info.group, "version": info.version, "kind": info.kind}
    resource = {"group": info.group, "version": info.version, "resource": info.plural}
    found: Object = {"uid": str(uuid.uuid4()), "kind": kind, "resource": resource}
    if asked.subresource:
        found["subResource"] = asked.subresource
    found |= {"requestKind": kind, "requestResource": resource}
    if asked.subresource:
        found["requestSubResource"] = asked.subresource
    found |= {"name": asked.name} if asked.name else {}
    found |= {"namespace": asked.namespace} if asked.namespace else {}
    return {
        **found,
        "operation": asked.operation,
        "userInfo": asked.user.as_json(),
        "object": obj,
        "oldObject": old,
        "dryRun": asked.dry_run,
        "options": dict(asked.options),
    }


def _response(body: bytes, uid: str) -> Mapping[str, Any]:
    try:
        review = json.loads(body)
        response = review.get("response") if isinstance(review, dict) else None
    except ValueError:
        response = None
    if not isinstance(response, dict):
        raise _CallFailed("received invalid webhook response: webhook response was absent")
    if response.get("uid") != uid:
        got = response.get("uid") or ""
        raise _CallFailed(f'received invalid webhook response: expected response.uid="{uid}", got "{got}"')
    return response


def _operations(response: Mapping[str, Any]) -> list[Any]:
    if not response.get("patch"):
        return []
    try:
        found = json.loads(base64.b64decode(response["patch"], validate=True))
    except (ValueError, binascii.Error) as error:
        raise _CallFailed(f"received invalid webhook response: the patch cannot be read: {error}") from error
    if response.get("patchType") != "JSONPatch" or not isinstance(found, list):
        raise _CallFailed("received invalid webhook response: the patch is no JSONPatch")
    return found


def _internal(message: str) -> ApiError:
    return ApiError(500, "InternalError", f"Internal error occurred: {message}", {"causes": [{"message": message}]})


def _denied(name: str, status: Mapping[str, Any]) -> ApiError:
    text = f'admission webhook "{name}" denied the request'
    message = status.get("message") or status.get("reason")
    text = f"{text}: {message}" if message else f"{text} without explanation"
    return ApiError(int(status.get("code") or 400), str(status.get("reason") or ""), text, {})
