"""The webhook on virt-launcher pods: puts the claim's name on them, and keeps others from naming it.

The controller does not depend on it: a pod without the reference gets its claim by its VMI.
"""

import asyncio
import base64
import json
import logging
import os
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from vmnet.controller import objects
from vmnet.controller.certificates import Certificates, renewed
from vmnet.controller.cluster import Cluster
from vmnet.kube.api import (
    MUTATING_WEBHOOKS,
    SECRETS,
    VALIDATING_WEBHOOKS,
    VMIS,
    AlreadyExists,
    Conflict,
    Kube,
    KubeError,
    NotFound,
    Object,
    Resource,
)
from vmnet.model import names
from vmnet.model.selection import selections
from vmnet.runtime.backoff import Backoff

log = logging.getLogger(__name__)

CONFIGURATION: Final = "vmnet-pods"
"""Name of both webhook configurations."""
SECRET: Final = "vmnet-webhook"  # noqa: S105
SERVICE: Final = "vmnet-webhook"
MUTATE: Final = "/mutate"
VALIDATE: Final = "/validate"
LOOK_AGAIN_SECONDS: Final = 60.0
FIRST_LOOK_SECONDS: Final = 1.0
"""While there is no certificate yet."""
_BODY_LIMIT: Final = 4 * 1024 * 1024
_ADMINISTRATORS: Final = "system:masters"
_CREATORS: Final = "kubevirt-controller"
"""Service account, in whatever namespace KubeVirt is, that creates the pods of machines."""
_GUARDED_LABELS: Final = (names.LAUNCHER_LABEL, names.CREATED_BY_LABEL)


class Reviewer:
    """What the webhook says about a pod. Reads; writes nothing."""

    def __init__(self, kube: Kube, cluster: Cluster, default_namespace: str) -> None:
        """``default_namespace``: where the attachment ``default`` is said to be in requests for addresses."""
        self._kube = kube
        self._cluster = cluster
        self._default_namespace = default_namespace

    async def mutate(self, request: Mapping[str, Any]) -> list[Object]:
        """Operations (RFC 6902) that put the claim of its machine on a pod, source or target of a migration alike."""
        pod = _pod_of(request)
        if not objects.is_launcher(pod):
            return []
        vmi = await self._machine(pod)
        wanted = self._references(vmi, objects.namespace_of(pod)) if vmi is not None else {}
        have = objects.annotations(pod)
        missing = {key: value for key, value in wanted.items() if key not in have}
        if not missing:
            return []
        found: list[Object] = []
        if not pod["metadata"].get("annotations"):
            found.append({"op": "add", "path": "/metadata/annotations", "value": {}})
        for key, value in missing.items():
            path = "/metadata/annotations/" + key.replace("~", "~0").replace("/", "~1")
            found.append({"op": "add", "path": path, "value": value})
        return found

    async def refusal(self, request: Mapping[str, Any]) -> str | None:
        """Why a pod must not be created or changed like this; None when it may."""
        pod = _pod_of(request)
        old = request.get("oldObject")
        if request.get("operation") == "UPDATE" and old is not None and _guarded(pod) == _guarded(old):
            return None
        if not _trusted(request.get("userInfo") or {}):
            what = "changes what binds a pod to a machine" if old is not None else "creates pods for a machine"
            return f"only KubeVirt {what} (label {names.LAUNCHER_LABEL}={names.LAUNCHER_LABEL_VALUE})"
        try:
            named = _named_claims(pod)
        except ValueError as error:
            return str(error)
        if not named:
            return None
        vmi = await self._machine(pod)
        if vmi is None:
            return f"it refers to IPAMClaim {', '.join(sorted(named))}, but belongs to no VirtualMachineInstance"
        own = {names.claim_name(vmi["metadata"]["name"], network) for network in objects.machine_networks(vmi)}
        others = sorted(named - own)
        if others:
            return f"IPAMClaim {', '.join(others)} is not one of machine {vmi['metadata']['name']}"
        return None

    async def _machine(self, pod: Object) -> Object | None:
        """The VMI that a pod belongs to. It was made before the pod, but the watch may be behind."""
        found = self._cluster.machine_of(pod)
        owner = objects.owner_reference(pod, controller=False)
        if found is not None or owner is None or owner.get("kind") != objects.VMI_KIND:
            return found
        try:
            vmi = await self._kube.get(VMIS, str(owner["name"]), objects.namespace_of(pod))
        except NotFound:
            return None
        return vmi if vmi["metadata"].get("uid") == owner.get("uid") else None

    def _references(self, vmi: Object, namespace: str) -> dict[str, str]:
        attachment = self._cluster.primary(namespace) if self._cluster.labelled(namespace) else None
        network = objects.primary_network_name(vmi)
        if attachment is None or network is None or not attachment.network.persistent:
            return {}
        claim = names.claim_name(vmi["metadata"]["name"], network)
        found = {names.PRIMARY_CLAIM_ANNOTATION: claim}
        try:
            asked = objects.machine_request(vmi, network)
        except ValueError as error:
            # The claim's condition says it too; a pod that is not created would say it to nobody.
            log.info("VMI %s/%s: %s", namespace, vmi["metadata"]["name"], error)
            return found
        if asked.addresses or asked.mac:
            element: Object = {"name": "default", "namespace": self._default_namespace}
            lengths = {subnet.version: subnet.prefixlen for subnet in attachment.network.subnets}
            if asked.addresses:
                element["ips"] = [f"{item}/{lengths.get(item.version, item.max_prefixlen)}" for item in asked.addresses]
            element |= {"mac": asked.mac} if asked.mac else {}
            found[names.DEFAULT_NETWORK_ANNOTATION] = json.dumps([{**element, "ipam-claim-reference": claim}])
        return found


def _pod_of(request: Mapping[str, Any]) -> Object:
    """The pod as it shall be; its namespace is the request's."""
    pod: Object = request["object"]
    return {**pod, "metadata": {**pod.get("metadata", {}), "namespace": request.get("namespace", "")}}


def _named_claims(pod: Object) -> set[str]:
    """Names of the claims that a pod refers to. Raises ValueError."""
    found = {objects.annotations(pod).get(names.PRIMARY_CLAIM_ANNOTATION), objects.pod_request(pod).claim}
    text = objects.annotations(pod).get(names.DEFAULT_NETWORK_ANNOTATION) or ""
    if text.lstrip().startswith("["):
        # The other annotation hides this one, but both must be true.
        found |= {element.get("ipam-claim-reference") for element in json.loads(text)}
    found |= {item.claim for item in selections(pod["metadata"])}
    return {str(item) for item in found if item}


def _guarded(pod: Object) -> tuple[object, ...]:
    """What binds a pod to a machine and its addresses."""
    have, metadata = objects.annotations(pod), pod.get("metadata") or {}
    keys = (names.PRIMARY_CLAIM_ANNOTATION, names.DEFAULT_NETWORK_ANNOTATION, names.NETWORKS_ANNOTATION)
    return (
        *(have.get(key) for key in keys),
        *(objects.labels(pod).get(label) for label in _GUARDED_LABELS),
        metadata.get("ownerReferences") or [],
    )


def _trusted(user: Mapping[str, Any]) -> bool:
    name, groups = str(user.get("username") or ""), user.get("groups") or []
    parts = name.split(":")
    account = len(parts) == 4 and parts[:2] == ["system", "serviceaccount"] and parts[3] == _CREATORS
    return account or _ADMINISTRATORS in groups


def application(reviewer: Reviewer) -> web.Application:
    """``POST /mutate`` and ``/validate``: AdmissionReview (``admission.k8s.io/v1``) in and out."""

    async def asked(request: web.Request) -> Mapping[str, Any]:
        try:
            review = await request.json()
            found = review["request"]
            if not isinstance(found, dict) or not isinstance(found.get("object"), dict):
                raise ValueError("no object")
        except (ValueError, KeyError, TypeError) as error:
            raise web.HTTPBadRequest(text=f"not an AdmissionReview: {error}\n") from error
        return found

    def answer(request: Mapping[str, Any], **response: Any) -> web.Response:
        body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
        return web.json_response({**body, "response": {"uid": request.get("uid"), **response}})

    async def mutate(request: web.Request) -> web.Response:
        found = await asked(request)
        try:
            operations = await reviewer.mutate(found)
        except KubeError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        if not operations:
            return answer(found, allowed=True)
        patch = base64.b64encode(json.dumps(operations).encode()).decode()
        return answer(found, allowed=True, patchType="JSONPatch", patch=patch)

    async def validate(request: web.Request) -> web.Response:
        found = await asked(request)
        try:
            problem = await reviewer.refusal(found)
        except KubeError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        if problem is None:
            return answer(found, allowed=True)
        log.warning("pod %s/%s refused: %s", found.get("namespace"), found.get("name"), problem)
        return answer(found, allowed=False, status={"code": 403, "reason": "Forbidden", "message": problem})

    app = web.Application(client_max_size=_BODY_LIMIT)
    app.add_routes([web.post(MUTATE, mutate), web.post(VALIDATE, validate)])
    return app


@dataclass(frozen=True, slots=True)
class Place:
    """Where the API finds the webhook: by the Service in ``namespace``, or by ``url`` where there is no such thing."""

    namespace: str
    url: str | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names in the certificate."""
        service = f"{SERVICE}.{self.namespace}"
        found = (f"{service}.svc", service, f"{service}.svc.cluster.local")
        host = urlsplit(self.url).hostname if self.url else None
        return (*found, host) if host else found

    def client(self, path: str, bundle: str) -> Object:
        """``clientConfig`` of one webhook."""
        if self.url:
            return {"url": self.url.rstrip("/") + path, "caBundle": bundle, "service": None}
        return {"caBundle": bundle}


class Keeper:
    """The leader's part: makes and renews the certificates, and tells the API which to believe."""

    def __init__(self, kube: Kube, place: Place, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._kube = kube
        self._place = place
        self._now = now

    async def run(self) -> None:
        """Look after them until cancelled."""
        backoff, failures = Backoff(), 0
        while True:
            try:
                await self.keep()
            except KubeError as error:
                failures += 1
                log.warning("webhook certificates: %s", error)
                await asyncio.sleep(backoff.delay(failures, random.random()))  # noqa: S311
            else:
                failures = 0
                await asyncio.sleep(LOOK_AGAIN_SECONDS)

    async def keep(self) -> None:
        """Once: what is missing, late or different is put right."""
        secret = await self._secret()
        found = None
        try:
            found = Certificates.from_secret(secret.get("data") or {}) if secret is not None else None
        except ValueError as error:
            log.warning("Secret %s/%s is made anew: %s", self._place.namespace, SECRET, error)
        wanted = renewed(found, self._place.hosts, self._now())
        # First who is believed, then who is to be believed: nothing is ever served that the API does not know yet.
        for resource, path in ((MUTATING_WEBHOOKS, MUTATE), (VALIDATING_WEBHOOKS, VALIDATE)):
            await self._announce(resource, path, wanted.bundle)
        if wanted != found:
            await self._write(secret, wanted)

    async def _secret(self) -> Object | None:
        try:
            return await self._kube.get(SECRETS, SECRET, self._place.namespace)
        except NotFound:
            return None

    async def _write(self, secret: Object | None, wanted: Certificates) -> None:
        body: Object = {"metadata": {"name": SECRET}, "type": "Opaque", "data": wanted.secret_data()}
        if secret is None:
            kind = {"apiVersion": SECRETS.api_version, "kind": SECRETS.kind}
            try:
                await self._kube.create(SECRETS, {**kind, **body}, self._place.namespace)
            except AlreadyExists:
                log.info("Secret %s was made by somebody else meanwhile", SECRET)
                raise
        else:
            body["metadata"]["resourceVersion"] = secret["metadata"]["resourceVersion"]
            await self._kube.patch(SECRETS, SECRET, body, self._place.namespace)
        log.info("the webhook has a new certificate")

    async def _announce(self, resource: Resource, path: str, bundle: str) -> None:
        try:
            found = await self._kube.get(resource, CONFIGURATION)
        except NotFound:
            # Not installed: everything works without.
            return
        hooks = found.get("webhooks") or []
        wanted: list[Object] = []
        for hook in hooks:
            client = {**(hook.get("clientConfig") or {}), **self._place.client(path, bundle)}
            wanted.append({**hook, "clientConfig": {key: value for key, value in client.items() if value is not None}})
        if wanted == hooks:
            return
        version = found["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version}, "webhooks": wanted}
        try:
            await self._kube.patch(resource, CONFIGURATION, body)
        except (NotFound, Conflict) as error:
            log.info("%s %s changed meanwhile: %s", resource.kind, CONFIGURATION, error)
            raise


class Server:
    """Every replica's part: serves with the certificate in the Secret, and takes up a new one as it runs."""

    def __init__(self, kube: Kube, reviewer: Reviewer, place: Place, address: tuple[str, int]) -> None:
        self._kube = kube
        self._reviewer = reviewer
        self._place = place
        self._address = address
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._used: Certificates | None = None
        self.addresses: Sequence[tuple[str, int]] = ()
        """Where it listens; empty until there is a certificate."""

    async def run(self) -> None:
        """Serve until cancelled, from the moment there is a certificate."""
        runner = web.AppRunner(application(self._reviewer), access_log=None)
        await runner.setup()
        try:
            while True:
                await self._look()
                if self._used is not None and not self.addresses:
                    await web.TCPSite(runner, *self._address, ssl_context=self._context).start()
                    self.addresses = [(item[0], item[1]) for item in runner.addresses]
                    log.info("the webhook listens on %s", self.addresses)
                await asyncio.sleep(LOOK_AGAIN_SECONDS if self._used is not None else FIRST_LOOK_SECONDS)
        finally:
            await runner.cleanup()

    async def _look(self) -> None:
        try:
            secret = await self._kube.get(SECRETS, SECRET, self._place.namespace)
            found = Certificates.from_secret(secret.get("data") or {})
        except NotFound:
            return
        except (KubeError, ValueError) as error:
            log.warning("webhook certificate: %s", error)
            return
        if found != self._used:
            _load(self._context, found)
            self._used = found


def _load(context: ssl.SSLContext, found: Certificates) -> None:
    """New connections get this certificate. It is never on a disk; the file system may be read-only."""
    number = os.memfd_create("vmnet-webhook", os.MFD_CLOEXEC)
    with os.fdopen(number, "wb") as file:
        file.write((found.certificate + found.key).encode())
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{number}")
