"""Certificates by which agents know each other: the controller signs what agents ask for, for their own nodes only.

The authority is this purpose's own (Secret ``vmnet-agents``) and signs nothing else. A request is believed when the
agents' service account made it; where the API server says on which node the asking pod runs (Kubernetes 1.32), a
certificate is signed for that node alone (docs/adr/agents-know-each-other-by-certificate.md).
"""

import asyncio
import base64
import binascii
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmnet.controller import certificates
from vmnet.kube.api import (
    CERTIFICATE_REQUESTS,
    NODES,
    SECRETS,
    AlreadyExists,
    Conflict,
    EventType,
    Expired,
    Kube,
    KubeError,
    NotFound,
    Object,
)
from vmnet.model import names
from vmnet.runtime.backoff import Backoff

log = logging.getLogger(__name__)

SECRET: Final = "vmnet-agents"  # noqa: S105
LIFETIME: Final = timedelta(days=7)
IDENTITY: Final = "vmnet://agent/"
ACCOUNT: Final = names.AGENT_ACCOUNT
_NODE_NAME: Final = "authentication.kubernetes.io/node-name"
_ADMINISTRATORS: Final = "system:masters"
_USAGES: Final = frozenset({"digital signature", "client auth", "server auth"})
_SKEW: Final = timedelta(hours=1)
_PATIENCE: Final = Backoff(first=1.0)


class Refused(Exception):
    """A request that must not be signed, and why."""


@dataclass(frozen=True, slots=True)
class Authority:
    """PEM of the authorities (the one that signs first) and of the first one's key."""

    certificates: str
    key: str

    def secret_data(self) -> dict[str, str]:
        """A Secret's ``data``."""
        fields = {"ca.crt": self.certificates, "ca.key": self.key}
        return {name: base64.b64encode(text.encode()).decode() for name, text in fields.items()}

    @classmethod
    def from_secret(cls, data: Mapping[str, str]) -> "Authority":
        """Raises ValueError."""
        try:
            texts = [base64.b64decode(data[name], validate=True).decode() for name in ("ca.crt", "ca.key")]
        except (KeyError, binascii.Error, UnicodeDecodeError) as error:
            raise ValueError(f"the Secret lacks a readable {error}") from error
        x509.load_pem_x509_certificates(texts[0].encode())
        certificates.private_key(texts[1])
        return cls(*texts)


def renewed(found: Authority | None, now: datetime) -> Authority:
    """What signs from now on; a former authority stays among those that are believed until it expires."""
    former = x509.load_pem_x509_certificates(found.certificates.encode()) if found is not None else []
    if found is not None and not certificates.late(former[0], now):
        return found
    authority, key = certificates.new_authority("vmnet agents", now)
    living = [item for item in former if item.not_valid_after_utc > now]
    return Authority(certificates.pem((authority, *living)), certificates.key_pem(key))


def judged(request: Object, account: str) -> tuple[x509.CertificateSigningRequest, str]:
    """What a request asks to have signed, and for which node. Raises Refused."""
    spec = request.get("spec") or {}
    if spec.get("username") != account and _ADMINISTRATORS not in (spec.get("groups") or []):
        raise Refused(f"{spec.get('username')} is not {account}")
    if not set(spec.get("usages") or []) <= _USAGES:
        raise Refused("usages that no agent has")
    try:
        asked = x509.load_pem_x509_csr(base64.b64decode(spec.get("request") or "", validate=True))
        extension = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        key = asked.public_key()
        genuine = asked.is_signature_valid
    except (ValueError, binascii.Error, x509.ExtensionNotFound, InvalidSignature) as error:
        raise Refused(f"the request cannot be read: {error}") from error
    if not genuine or not isinstance(key, ec.EllipticCurvePublicKey):
        raise Refused("the request is not signed by the key that it shows, or the key is of another kind than ours")
    identities = list(extension.value)
    node = identities[0].value.removeprefix(IDENTITY) if len(identities) == 1 else ""
    if len(identities) != 1 or identities != [x509.UniformResourceIdentifier(IDENTITY + str(node))]:
        raise Refused("it names something else than one node's agent")
    told = (spec.get("extra") or {}).get(_NODE_NAME)
    if told and list(told) != [node]:
        raise Refused(f"the agent that asks is on node {', '.join(told)}, not {node}")
    return asked, str(node)


def signed(authority: Authority, asked: x509.CertificateSigningRequest, node: str, now: datetime) -> str:
    """PEM of the certificate, and of the authorities that its owner should believe."""
    first = x509.load_pem_x509_certificates(authority.certificates.encode())[0]
    key = certificates.private_key(authority.key)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    identity = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(IDENTITY + node)])
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmnet-agent")]))
        .issuer_name(first.subject)
        .public_key(asked.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(now + LIFETIME, first.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(identity, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode() + authority.certificates


class Signer:
    """Answers the agents' requests for as long as this controller leads."""

    def __init__(self, kube: Kube, namespace: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._kube = kube
        self._namespace = namespace
        self._account = f"system:serviceaccount:{namespace}:{ACCOUNT}"
        self._now = now

    async def run(self) -> None:
        """List, watch, answer, until cancelled."""
        failures = 0
        while True:
            try:
                await self._follow()
                failures = 0
            except Expired:
                continue
            except (KubeError, ValueError) as error:
                failures += 1
                log.warning("agents' certificates: %s", error)
            await asyncio.sleep(_PATIENCE.delay(max(1, failures), random.random()))  # noqa: S311

    async def _follow(self) -> None:
        selector = f"spec.signerName={names.AGENT_SIGNER}"
        listed = await self._kube.list(CERTIFICATE_REQUESTS, fields=selector)
        for item in listed.items:
            await self.answer(item)
        async for event in self._kube.watch(CERTIFICATE_REQUESTS, listed.resource_version, fields=selector):
            if event.type is EventType.ADDED:
                await self.answer(event.object)

    async def answer(self, request: Object) -> None:
        """Approve and sign a request, or deny it; one that is answered is left alone. Raises KubeError."""
        status = request.get("status") or {}
        name = request["metadata"]["name"]
        kinds = {condition.get("type") for condition in status.get("conditions") or []}
        if (request.get("spec") or {}).get("signerName") != names.AGENT_SIGNER:
            return
        if status.get("certificate") or kinds & {"Denied", "Failed"}:
            return
        try:
            asked, node = judged(request, self._account)
            await self._kube.get(NODES, node)
        except (Refused, NotFound) as error:
            log.warning("certificate request %s: %s", name, error)
            await self._write(request, "approval", conditions=[_condition("Denied", "NotAnAgent", str(error))])
            return
        if "Approved" not in kinds:
            approved = [_condition("Approved", "AgentOfNode", f"the agent of node {node}")]
            request = await self._write(request, "approval", conditions=approved)
        text = signed(await self.authority(), asked, node, self._now())
        await self._write(request, "status", certificate=base64.b64encode(text.encode()).decode())
        log.info("certificate for the agent of node %s", node)

    async def authority(self) -> Authority:
        """The one that signs; made when there is none, or a new one when it is old. Raises KubeError, ValueError."""
        while True:
            try:
                found: Object | None = await self._kube.get(SECRETS, SECRET, self._namespace)
            except NotFound:
                found = None
            have = Authority.from_secret(found.get("data") or {}) if found is not None else None
            wanted = renewed(have, self._now())
            if wanted == have:
                return wanted
            try:
                await self._store(found, wanted)
            except Conflict:
                continue  # another controller was faster
            return wanted

    async def _store(self, found: Object | None, wanted: Authority) -> None:
        if found is None:
            body: Object = {"metadata": {"name": SECRET}, "type": "Opaque", "data": wanted.secret_data()}
            try:
                await self._kube.create(SECRETS, body, self._namespace)
            except AlreadyExists as error:
                raise Conflict(str(error)) from error
            return
        version = found["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version}, "data": wanted.secret_data()}
        await self._kube.patch(SECRETS, SECRET, body, self._namespace)

    async def _write(self, request: Object, subresource: str, **status: Any) -> Object:
        metadata = request["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": status}
        return await self._kube.patch(CERTIFICATE_REQUESTS, metadata["name"], body, subresource=subresource)


def _condition(kind: str, reason: str, message: str) -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": reason, "message": message}
