"""Certificates of each kind for tests: good ones, and each that must not be trusted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key


def reissue(folder: Path, stem: str, *, days_ago: int) -> None:
    """Give DIR/STEM.pem again with the same key and names, valid until so many days ago."""
    made = x509.load_pem_x509_certificate((folder / f"{stem}.pem").read_bytes())
    key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(made.subject)
        .issuer_name(made.issuer)
        .public_key(made.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=days_ago + 30))
        .not_valid_after(now - timedelta(days=days_ago))
    )
    for extension in made.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    (folder / f"{stem}.pem").write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))  # type: ignore[arg-type]
