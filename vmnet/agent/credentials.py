"""What this agent shows to the others: a key that never leaves the process, a certificate that the controller signs.

It is asked for by a CertificateSigningRequest of the cluster's API and brings the authorities along. Nothing is kept:
an agent that starts makes a new key and asks anew.
"""

import asyncio
import base64
import hashlib
import logging
import os
import random
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vmnet.agent.peers import IDENTITY
from vmnet.kube.api import CERTIFICATE_REQUESTS, AlreadyExists, Kube, KubeError, Object
from vmnet.model import names
from vmnet.runtime.backoff import Backoff

log = logging.getLogger(__name__)

USAGES: Final = ("digital signature", "client auth", "server auth")
LOOK_SECONDS: Final = 1.0
SIGNED_SECONDS: Final = 120.0
"""A request that nobody has answered for so long is made anew."""


class Credentials:
    """TLS contexts, renewed in good time for as long as ``run`` does. ``server`` and ``client`` never change."""

    def __init__(self, kube: Kube, node: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._kube = kube
        self._node = node
        self._now = now
        self.server: ssl.SSLContext | None = None
        self.client: ssl.SSLContext | None = None

    async def run(self) -> None:
        """Ask, and ask again when two thirds of the certificate's time are over."""
        backoff = Backoff(first=1.0, most=60.0)
        failures = 0
        while True:
            try:
                seconds = await self.renew()
            except (KubeError, ValueError, TimeoutError) as error:
                failures += 1
                log.warning("no certificate to talk to other agents with: %s", error or "nobody has signed it")
                seconds = backoff.delay(failures, random.random())  # noqa: S311
            else:
                failures = 0
            await asyncio.sleep(seconds)

    async def renew(self) -> float:
        """Get a certificate for a new key; returns after how many seconds the next is due.

        Raises KubeError, ValueError (what came back is no such certificate), TimeoutError.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = await self._request(key)
        async with asyncio.timeout(SIGNED_SECONDS):
            text = await self._signed(name)
            while not text:
                await asyncio.sleep(LOOK_SECONDS)
                text = await self._signed(name)
        certificate, *authorities = x509.load_pem_x509_certificates(text)
        if certificate.public_key() != key.public_key() or not authorities:
            raise ValueError(f"what the controller wrote into {name} is no certificate of this agent's key")
        self._use(key, certificate, authorities)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return max(LOOK_SECONDS, ((begin + (end - begin) * 2 / 3) - self._now()).total_seconds())

    async def _request(self, key: ec.EllipticCurvePrivateKey) -> str:
        public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        name = f"vmnet-agent-{hashlib.sha256(public).hexdigest()[:16]}"
        body: Object = {
            "apiVersion": CERTIFICATE_REQUESTS.api_version,
            "kind": CERTIFICATE_REQUESTS.kind,
            "metadata": {"name": name},
            "spec": {
                "signerName": names.AGENT_SIGNER,
                "usages": list(USAGES),
                "request": base64.b64encode(signing_request(key, self._node)).decode(),
            },
        }
        try:
            await self._kube.create(CERTIFICATE_REQUESTS, body)
        except AlreadyExists:
            log.debug("%s is there already", name)
        return name

    async def _signed(self, name: str) -> bytes:
        found = await self._kube.get(CERTIFICATE_REQUESTS, name)
        status = found.get("status") or {}
        for condition in status.get("conditions") or []:
            if condition.get("type") in ("Denied", "Failed"):
                raise ValueError(f"{name} is {condition['type'].lower()}: {condition.get('message', '')}")
        return base64.b64decode(status.get("certificate") or "", validate=True)

    def _use(
        self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, authorities: list[x509.Certificate]
    ) -> None:
        server = self.server or _context(ssl.PROTOCOL_TLS_SERVER)
        client = self.client or _context(ssl.PROTOCOL_TLS_CLIENT)
        own = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # ssl reads keys from files only; this one is nowhere but in memory.
        descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, own)
            for context in (server, client):
                context.load_cert_chain(f"/proc/self/fd/{descriptor}")
                for authority in authorities:
                    context.load_verify_locations(cadata=authority.public_bytes(serialization.Encoding.DER))
        finally:
            os.close(descriptor)
        self.server, self.client = server, client


def signing_request(key: ec.EllipticCurvePrivateKey, node: str) -> bytes:
    """PEM of a PKCS #10 request (RFC 2986) that names whose agent it is."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmnet-agent")])
    identity = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(IDENTITY + node)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(identity, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Who the other is, its certificate's URI tells (``peers``); its address may be any of its node's.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    return context
