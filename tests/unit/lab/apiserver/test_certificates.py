"""The authority and the server's certificate."""

import stat
from pathlib import Path

from cryptography import x509

from vmnet.lab.apiserver.certificates import prepare


def names(path: Path) -> set[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))}


def test_the_certificate_names_every_way_to_the_server(tmp_path: Path) -> None:
    found = prepare(tmp_path, ["172.30.0.1", "fd00:30::1", "lab.example.test"])
    wanted = {"172.30.0.1", "fd00:30::1", "lab.example.test", "127.0.0.1", "localhost", "kubernetes.default.svc"}
    assert names(found.certificate) >= wanted
    assert stat.S_IMODE(found.key.stat().st_mode) == 0o600
    found.context()


def test_it_is_kept_while_it_fits_and_made_anew_under_the_same_authority(tmp_path: Path) -> None:
    first = prepare(tmp_path, ["127.0.0.1"])
    authority, certificate = first.authority.read_bytes(), first.certificate.read_bytes()
    prepare(tmp_path, ["127.0.0.1"])
    assert first.certificate.read_bytes() == certificate
    prepare(tmp_path, ["172.30.0.1"])
    assert first.certificate.read_bytes() != certificate
    assert first.authority.read_bytes() == authority
    issued = x509.load_pem_x509_certificate(first.certificate.read_bytes())
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
