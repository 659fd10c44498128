"""Signing and verifying a bundle, and what is refused."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from coinfer.bundle import SIGNATURE, Bundle, load_bundle, write_manifest
from coinfer.errors import BundleError, UsageError
from coinfer.signature import load_signed_bundle, new_key, sign, verify_signature

pytest.importorskip("cryptography", reason="signatures need the edge extra")


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def public(key: Path) -> Path:
    return key.with_name("key.pem.pub")


def test_a_signature_verifies_and_survives_a_move(bundle: Path, key: Path, tmp_path: Path) -> None:
    before = load_bundle(bundle).digest
    assert sign(bundle, key) == bundle / SIGNATURE
    moved = bundle.rename(tmp_path / "moved")
    assert verify_signature(moved, public(key)) == load_bundle(moved).digest == before
    assert load_signed_bundle(moved, public(key)).digest == before


def test_the_signature_is_no_part_of_the_manifest(bundle: Path, key: Path) -> None:
    sign(bundle, key)
    manifest = load_bundle(bundle).manifest
    write_manifest(bundle, manifest)
    assert load_bundle(bundle).manifest == manifest and SIGNATURE not in manifest.files


def test_openssl_agrees(bundle: Path, key: Path, tmp_path: Path) -> None:
    """RFC 8032 over the bytes of bundle.json, nothing of our own."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    sign(bundle, key)
    (tmp_path / "raw").write_bytes(bytes.fromhex((bundle / SIGNATURE).read_text()))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public(key), "-rawin"]
    command += ["-in", bundle / "bundle.json", "-sigfile", tmp_path / "raw"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_a_private_key_is_its_owners_alone_and_never_overwritten(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    with pytest.raises(UsageError, match="key.pem exists: a key is never overwritten"):
        new_key(key)
    assert key.read_bytes() == before


def test_one_changed_byte_of_bundle_json_is_refused_before_it_is_read(bundle: Path, key: Path) -> None:
    sign(bundle, key)
    raw = (bundle / "bundle.json").read_bytes()
    (bundle / "bundle.json").write_bytes(raw + b" ")
    with pytest.raises(BundleError, match="its signature is not of key"):
        load_signed_bundle(bundle, public(key))
    (bundle / "bundle.json").write_bytes(b"not JSON at all")
    with pytest.raises(BundleError, match="its signature is not of key"):
        load_signed_bundle(bundle, public(key))


def test_a_changed_file_of_a_signed_bundle_is_refused(bundle: Path, key: Path) -> None:
    sign(bundle, key)
    with (bundle / "segments/whole.onnx").open("ab") as file:
        file.write(b"\0")
    assert verify_signature(bundle, public(key))
    with pytest.raises(BundleError, match="does not have the sha256"):
        load_signed_bundle(bundle, public(key))
    with pytest.raises(BundleError, match="does not have the sha256"):
        sign(bundle, key)


def test_another_key_no_signature_and_no_hex_are_refused(bundle: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it is not signed: there is no bundle.json.sig"):
        verify_signature(bundle, public(key))
    sign(bundle, key)
    with pytest.raises(BundleError, match="its signature is not of key .*other.pub"):
        verify_signature(bundle, new_key(tmp_path / "other"))
    for content in (b"", b"\xff", b"zz", b"00" * 64, b"00" * 5000):
        (bundle / SIGNATURE).write_bytes(content)
        with pytest.raises(BundleError, match="its signature is not of key"):
            verify_signature(bundle, public(key))


def test_what_is_no_key_is_a_usage_error(bundle: Path, key: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="the key cannot be read: no such file"):
        sign(bundle, tmp_path / "nothing")
    for wrong in (tmp_path / "text", public(key)):
        with pytest.raises(UsageError, match="is a private Ed25519 key in PEM"):
            sign(bundle, wrong)
    for wrong in (tmp_path / "text", key):
        with pytest.raises(UsageError, match="is a public Ed25519 key in PEM"):
            verify_signature(bundle, wrong)
