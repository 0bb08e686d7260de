import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from vmnet.controller.certificates import AUTHORITY_DAYS, SERVING_DAYS, Certificates, renewed

HOSTS = ("vmnet-webhook.vmnet-system.svc", "172.30.0.1")
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def believed(found: Certificates, authorities: str, now: datetime) -> bool:
    store = Store(x509.load_pem_x509_certificates(authorities.encode()))
    verifier = PolicyBuilder().store(store).time(now).build_server_verifier(x509.DNSName(HOSTS[0]))
    try:
        verifier.verify(x509.load_pem_x509_certificate(found.certificate.encode()), [])
    except x509.verification.VerificationError:
        return False
    return True


def test_what_is_made_serves_and_is_believed(tmp_path: Path) -> None:
    made = renewed(None, HOSTS, NOW)
    assert believed(made, made.authorities, NOW)
    (tmp_path / "pem").write_text(made.certificate + made.key)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "pem")
    serving = x509.load_pem_x509_certificate(made.certificate.encode())
    names = serving.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOSTS[0]]
    assert [str(item) for item in names.get_values_for_type(x509.IPAddress)] == [HOSTS[1]]


def test_a_secret_brings_them_back() -> None:
    made = renewed(None, HOSTS, NOW)
    assert Certificates.from_secret(made.secret_data()) == made
    assert renewed(made, HOSTS, NOW + timedelta(days=1)) is made


@pytest.mark.parametrize("field", ["ca.crt", "ca.key", "tls.crt", "tls.key"])
@pytest.mark.parametrize("value", [None, "!", "bm8="])
def test_a_spoiled_secret_is_an_error(field: str, value: str | None) -> None:
    data = renewed(None, HOSTS, NOW).secret_data()
    if value is None:
        del data[field]
    else:
        data[field] = value
    with pytest.raises(ValueError):
        Certificates.from_secret(data)


def test_a_serving_certificate_is_renewed_in_good_time_by_the_same_authority() -> None:
    made = renewed(None, HOSTS, NOW)
    later = renewed(made, HOSTS, NOW + timedelta(days=SERVING_DAYS * 0.7))
    assert later.certificate != made.certificate
    assert later.authorities == made.authorities
    assert believed(later, made.authorities, NOW + timedelta(days=SERVING_DAYS * 1.2))


def test_a_new_host_is_in_the_next_certificate() -> None:
    made = renewed(None, HOSTS[:1], NOW)
    assert renewed(made, HOSTS, NOW).certificate != made.certificate
    assert renewed(renewed(made, HOSTS, NOW), HOSTS[:1], NOW + timedelta(hours=1)).certificate


def test_a_former_authority_is_believed_until_it_expires() -> None:
    first = renewed(None, HOSTS, NOW)
    then = NOW + timedelta(days=AUTHORITY_DAYS * 0.7)
    serving = renewed(first, HOSTS, then - timedelta(days=30))
    second = renewed(serving, HOSTS, then)
    assert second.authority_key != first.authority_key
    # A replica that still serves the old certificate, and one that serves the new one.
    assert believed(serving, second.authorities, then)
    assert believed(second, second.authorities, then)
    much_later = NOW + timedelta(days=AUTHORITY_DAYS + 1)
    third = renewed(second, HOSTS, much_later)
    assert len(x509.load_pem_x509_certificates(third.authorities.encode())) == 2
    fourth = renewed(third, HOSTS, then + timedelta(days=AUTHORITY_DAYS * 0.7))
    assert len(x509.load_pem_x509_certificates(fourth.authorities.encode())) == 2
