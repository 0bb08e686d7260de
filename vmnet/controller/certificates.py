"""The webhook's certificates: made, and made anew in good time, by the controller itself. Pure."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmnet.model import addresses

AUTHORITY_DAYS: Final = 730
SERVING_DAYS: Final = 90
_SKEW: Final = timedelta(hours=1)
"""Clocks of the API servers may be behind."""
_FIELDS: Final = {"authorities": "ca.crt", "authority_key": "ca.key", "certificate": "tls.crt", "key": "tls.key"}


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts. ``authorities``: the one that signs first, then former ones that may still be in use."""

    authorities: str
    authority_key: str
    certificate: str
    key: str

    @classmethod
    def from_secret(cls, data: Mapping[str, str]) -> Self:
        """Read a Secret's ``data``. Raises ValueError."""
        try:
            found = {name: base64.b64decode(data[field], validate=True).decode() for name, field in _FIELDS.items()}
        except (KeyError, binascii.Error, UnicodeDecodeError) as error:
            raise ValueError(f"the Secret lacks a readable {error}") from error
        made = cls(**found)
        x509.load_pem_x509_certificates(made.authorities.encode())
        x509.load_pem_x509_certificate(made.certificate.encode())
        private_key(made.authority_key)
        private_key(made.key)
        return made

    def secret_data(self) -> dict[str, str]:
        """A Secret's ``data``."""
        return {field: base64.b64encode(getattr(self, name).encode()).decode() for name, field in _FIELDS.items()}

    @property
    def bundle(self) -> str:
        """``caBundle`` of a webhook's client configuration."""
        return base64.b64encode(self.authorities.encode()).decode()


def renewed(found: Certificates | None, hosts: Iterable[str], now: datetime) -> Certificates:
    """What is to be used from now on; ``found`` itself for as long as it serves.

    A certificate is replaced when two thirds of its time are over, or when it does not name all ``hosts``. A former
    authority stays in the bundle until it expires: a replica that has not read the new certificate yet is believed.
    """
    wanted = tuple(dict.fromkeys(hosts))
    if found is None:
        return _with_new_authority((), wanted, now)
    authorities = x509.load_pem_x509_certificates(found.authorities.encode())
    if late(authorities[0], now):
        return _with_new_authority(authorities, wanted, now)
    serving = x509.load_pem_x509_certificate(found.certificate.encode())
    names = set(serving.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if not late(serving, now) and names >= set(_names(wanted)):
        return found
    certificate, key = _serving(authorities[0], private_key(found.authority_key), wanted, now)
    return Certificates(pem(authorities), found.authority_key, certificate, key)


def new_authority(name: str, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate that signs itself and others, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: of two authorities with one name a client may try the wrong one.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {now:%Y-%m-%dT%H:%M:%S}")])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    authority = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return authority, key


def _with_new_authority(former: Iterable[x509.Certificate], hosts: Iterable[str], now: datetime) -> Certificates:
    authority, key = new_authority("vmnet webhook", now)
    living = [item for item in former if item.not_valid_after_utc > now]
    certificate, own_key = _serving(authority, key, hosts, now)
    return Certificates(pem((authority, *living)), key_pem(key), certificate, own_key)


def _serving(
    authority: x509.Certificate, authority_key: ec.EllipticCurvePrivateKey, hosts: Iterable[str], now: datetime
) -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    public = authority_key.public_key()
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmnet-controller")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=SERVING_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode(), key_pem(key)


def late(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of its time are over, or none has begun."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3 or now < begin


def _names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for host in hosts:
        try:
            found.append(x509.IPAddress(addresses.address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def pem(certificates: Iterable[x509.Certificate]) -> str:
    """PEM of each, one after the other."""
    return "".join(item.public_bytes(serialization.Encoding.PEM).decode() for item in certificates)


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """PEM, not encrypted."""
    format = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, format, serialization.NoEncryption()).decode()


def private_key(text: str) -> ec.EllipticCurvePrivateKey:
    """From PEM. Raises ValueError."""
    try:
        key = serialization.load_pem_private_key(text.encode(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"a private key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a private key is of another kind than ours")
    return key
