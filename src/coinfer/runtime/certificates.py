"""Certificates to try TLS with: a CA of one's own, one certificate for an edge and one for devices.

    DIR/ca.pem       whom devices trust, and whose devices an edge lets in
    DIR/ca.key       signs; keep it away from both machines
    DIR/server.pem   the edge's, for the hosts that were named;  DIR/server.key
    DIR/client.pem   a device's;  DIR/client.key
    DIR/crl.pem      which of them are revoked: none at first

They say themselves that they are for tests.  Keys are readable by their owner alone.  It needs the `cryptography`
library.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..files import write_atomically
from ..signature import write_secret

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

LABEL = "coinfer test CA, not for production"
FILES = ("ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key", "crl.pem")
DAYS = 90
# Clocks of small machines run behind.
_BEFORE = timedelta(hours=1)


def make_test_ca(folder: Path, hosts: Sequence[str], *, days: int = DAYS) -> None:
    """Write a CA, a server certificate for `hosts` (names and addresses), a client certificate and an empty CRL.

    Raises:
        UsageError: no host, one that is none, `days` below 1, or a file of these names exists.
        OSError: the folder cannot be written.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not hosts:
        raise UsageError("a certificate needs a host: --host NAME or --host ADDRESS")
    if not 1 <= days <= 3650:
        raise UsageError(f"a certificate is valid for 1 to 3650 days, got {days}")
    names = [_general_name(host) for host in hosts]
    for name in FILES:
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists: a key is never overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    life = (now - _BEFORE, now + timedelta(days=days))
    ca_key, ca_name = _key(), _name(LABEL)
    _write_key(folder / "ca.key", ca_key)
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(ca_name, ca_name, ca_key, life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_ca=True), critical=True)
        .add_extension(identifier, critical=False)
    )
    _write_certificate(folder / "ca.pem", ca, ca_key)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    for stem, purpose in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)):
        key = _key()
        _write_key(folder / f"{stem}.key", key)
        made = (
            _builder(_name(f"coinfer test {stem}"), ca_name, key, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(authority, critical=False)
        )
        if stem == "server":
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        _write_certificate(folder / f"{stem}.pem", made, ca_key)
    _write_crl(folder, [], days)


def revoke_certificate(folder: Path, certificate: Path, *, days: int = DAYS) -> None:
    """Add a certificate to the CRL of the CA in `folder`.

    Raises:
        UsageError: the folder has no such CA, or the certificate is none of its.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        revoked = x509.load_pem_x509_certificate(certificate.read_bytes())
        before = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        revoked.verify_directly_issued_by(ca)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise UsageError(f"{certificate} is no certificate of the CA in {folder}") from error
    _write_crl(folder, [*(entry.serial_number for entry in before), revoked.serial_number], days)


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode()
        if re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name) is not None:
            return x509.DNSName(name)
    except UnicodeError:
        pass
    raise UsageError(f"{ascii(host):.80} is no host's name or address")


def _key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, life: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(life[0])
        .not_valid_after(life[1])
    )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _write_certificate(path: Path, builder: x509.CertificateBuilder, signer: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    path.write_bytes(builder.sign(signer, SHA256()).public_bytes(Encoding.PEM))


def _write_crl(folder: Path, serials: Sequence[int], days: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(_name(LABEL))
    builder = builder.last_update(now - _BEFORE).next_update(now + timedelta(days=days))
    for serial in dict.fromkeys(serials):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _BEFORE).build()
        builder = builder.add_revoked_certificate(entry)
    write_atomically(folder / "crl.pem", builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
