import asyncio
import base64
import ssl
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from vmnet.agent.credentials import USAGES, Credentials, signing_request
from vmnet.controller import agent_certificates
from vmnet.controller.agent_certificates import ACCOUNT, LIFETIME, SECRET, Authority, Refused, Signer, judged, renewed
from vmnet.controller.certificates import AUTHORITY_DAYS
from vmnet.kube.api import CERTIFICATE_REQUESTS, NODES, SECRETS, Object
from vmnet.kube.fake import FakeKube
from vmnet.model import names

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
NAMESPACE = "vmnet-system"
USER = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
KEY = ec.generate_private_key(ec.SECP256R1())


def request(pem: bytes | None = None, **spec: Any) -> Object:
    body = {
        "signerName": names.AGENT_SIGNER,
        "usages": list(USAGES),
        "request": base64.b64encode(pem or signing_request(KEY, "n1")).decode(),
        "username": USER,
        "groups": ["system:serviceaccounts"],
    }
    return {"metadata": {"name": "vmnet-agent-1"}, "spec": body | spec}


def asked(*identities: x509.GeneralName, key: Any = KEY) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if identities:
        builder = builder.add_extension(x509.SubjectAlternativeName(identities), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"extra": {"authentication.kubernetes.io/node-name": ["n1"]}},
        {"username": "admin", "groups": ["system:masters"]},
    ],
)
def test_an_agent_s_own_request_is_believed(spec: dict[str, Any]) -> None:
    assert judged(request(**spec), USER)[1] == "n1"


@pytest.mark.parametrize(
    ("pem", "spec"),
    [
        (None, {"username": "system:serviceaccount:default:default"}),
        (None, {"username": None}),
        (None, {"extra": {"authentication.kubernetes.io/node-name": ["n2"]}}),
        (None, {"usages": ["cert sign"]}),
        (None, {"request": "no base64"}),
        (b"no request", {}),
        (asked(), {}),
        (asked(x509.DNSName("n1")), {}),
        (asked(uri("vmnet://agent/n1"), uri("vmnet://agent/n2")), {}),
        (asked(uri("vmnet://agent/n1"), x509.DNSName("kubernetes.default")), {}),
        (asked(uri("spiffe://agent/n1")), {}),
        (asked(uri("vmnet://agent/n1"), key=rsa.generate_private_key(65537, 2048)), {}),
    ],
)
def test_others_requests_are_not(pem: bytes | None, spec: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        judged(request(pem, **spec), USER)


def test_an_authority_outlives_its_successor_s_beginning() -> None:
    first = renewed(None, NOW)
    assert Authority.from_secret(first.secret_data()) == first
    assert renewed(first, NOW + timedelta(days=1)) is first
    second = renewed(first, NOW + timedelta(days=AUTHORITY_DAYS * 0.7))
    assert second.certificates.endswith(first.certificates)
    assert second.key != first.key
    with pytest.raises(ValueError):
        Authority.from_secret({})


async def cluster() -> FakeKube:
    kube = FakeKube()
    await kube.create(NODES, {"metadata": {"name": "n1"}})
    return kube


async def test_an_agent_gets_what_it_asked_for_and_another_authority_does_not_count() -> None:
    kube = await cluster()
    signer = Signer(kube, NAMESPACE, lambda: NOW)
    made = await kube.create(CERTIFICATE_REQUESTS, request())
    await signer.answer(made)
    answered = await kube.get(CERTIFICATE_REQUESTS, "vmnet-agent-1")
    text = base64.b64decode(answered["status"]["certificate"])
    certificate, authority = x509.load_pem_x509_certificates(text)
    assert certificate.public_key() == KEY.public_key()
    certificate.verify_directly_issued_by(authority)
    assert certificate.not_valid_after_utc == NOW + LIFETIME
    identity = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(identity) == [uri("vmnet://agent/n1")]
    assert answered["status"]["conditions"][0]["type"] == "Approved"
    secret = await kube.get(SECRETS, SECRET, NAMESPACE)
    assert base64.b64decode(secret["data"]["ca.crt"]).decode() in text.decode()
    # What is answered is left alone.
    await signer.answer(answered)
    assert await kube.get(CERTIFICATE_REQUESTS, "vmnet-agent-1") == answered


@pytest.mark.parametrize("spec", [{"username": "mallory"}, {"request": base64.b64encode(asked()).decode()}])
async def test_a_request_that_must_not_be_signed_is_denied(spec: dict[str, Any]) -> None:
    kube = await cluster()
    await Signer(kube, NAMESPACE, lambda: NOW).answer(await kube.create(CERTIFICATE_REQUESTS, request(**spec)))
    status = (await kube.get(CERTIFICATE_REQUESTS, "vmnet-agent-1"))["status"]
    assert [condition["type"] for condition in status["conditions"]] == ["Denied"]
    assert "certificate" not in status


async def test_an_agent_of_no_node_is_denied_and_another_signer_s_request_is_not_touched() -> None:
    kube = await cluster()
    signer = Signer(kube, NAMESPACE, lambda: NOW)
    await signer.answer(await kube.create(CERTIFICATE_REQUESTS, request(signing_request(KEY, "n9"))))
    status = (await kube.get(CERTIFICATE_REQUESTS, "vmnet-agent-1"))["status"]
    assert [condition["type"] for condition in status["conditions"]] == ["Denied"]
    other = request(signerName="kubernetes.io/kubelet-serving") | {"metadata": {"name": "other"}}
    await signer.answer(await kube.create(CERTIFICATE_REQUESTS, other))
    assert "status" not in await kube.get(CERTIFICATE_REQUESTS, "other")


class Naming(FakeKube):
    """Writes down who asked, as an API server does."""

    async def create(self, resource: Any, body: Object, namespace: str | None = None) -> Object:
        if resource == CERTIFICATE_REQUESTS:
            body = body | {"spec": body["spec"] | {"username": USER}}
        return await super().create(resource, body, namespace)


async def test_agent_and_controller_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_certificates, "_PATIENCE", agent_certificates.Backoff(first=0.01))
    kube = Naming()
    await kube.create(NODES, {"metadata": {"name": "n1"}})
    signing = asyncio.create_task(Signer(kube, NAMESPACE).run(), name="signer")
    credentials = Credentials(kube, "n1")
    try:
        async with asyncio.timeout(60):
            seconds = await credentials.renew()
            first = credentials.server, credentials.client
            again = await credentials.renew()
    finally:
        signing.cancel()
        await asyncio.gather(signing, return_exceptions=True)
    assert 0 < seconds < LIFETIME.total_seconds()
    assert abs(again - seconds) < 600
    assert (credentials.server, credentials.client) == first, "sockets that listen keep their context"
    assert credentials.server is not None
    assert credentials.server.verify_mode is ssl.CERT_REQUIRED
    assert credentials.server.minimum_version is ssl.TLSVersion.TLSv1_3
