"""A bundle's signature: who made it, beside what it is.

    bundle.json        holds the sha256 of every other file
    bundle.json.sig    Ed25519 (RFC 8032) over the bytes of bundle.json, 64 bytes in hex and a line's end

Whoever trusts the public key and has checked the signature has checked every file, once the bundle is loaded.  The
signature is no part of the manifest: a bundle is the same one with it, without it, and wherever it is moved to.  Keys
are PEM files, such as `openssl genpkey -algorithm ed25519` makes.

The `cryptography` library is needed to sign and to verify, and for nothing else.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import SIGNATURE, Bundle, load_bundle, read_manifest
from .errors import BundleError, UsageError
from .files import write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_SIGNATURE_BYTES = 64
_KEY_BYTES = 65536


def new_key(path: Path) -> Path:
    """Write a new private key to `path`, readable by its owner alone, and its public key beside it.

    Returns:
        The public key's file, `path` with .pub behind it.

    Raises:
        UsageError: a file of either name exists.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists():
            raise UsageError(f"{file} exists: a key is never overwritten")
    key = Ed25519PrivateKey.generate()
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public


def write_secret(path: Path, content: bytes) -> None:
    """A new file that its owner alone may read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def sign(folder: Path, key: Path) -> Path:
    """Sign the bundle in `folder`, every file of which is checked first; the signature's file.

    Raises:
        BundleError: there is no bundle, or it was altered.
        UsageError: `key` is no private Ed25519 key.
    """
    private = _private(key)
    raw = read_manifest(folder)
    if load_bundle(folder).digest != hashlib.sha256(raw).hexdigest():
        raise BundleError(f"the bundle changed while it was signed (bundle {folder})")
    write_atomically(folder / SIGNATURE, private.sign(raw).hex().encode() + b"\n")
    return folder / SIGNATURE


def verify_signature(folder: Path, public_key: Path) -> str:
    """The digest of the bundle in `folder` that the holder of a key has signed; nothing of it is read before that.

    Raises:
        BundleError: there is no bundle or no signature, or it is not of this key and this bundle.json.
        UsageError: `public_key` is no public Ed25519 key.
    """
    from cryptography.exceptions import InvalidSignature

    public, raw, path = _public(public_key), read_manifest(folder), folder / SIGNATURE
    try:
        with path.open("rb") as file:
            text = file.read(2 * _SIGNATURE_BYTES + 2)
        public.verify(bytes.fromhex(text.decode("ascii")), raw)
    except OSError as error:
        raise BundleError(f"it is not signed: there is no {SIGNATURE} (bundle {folder})") from error
    except (ValueError, InvalidSignature) as error:
        raise BundleError(f"its signature is not of key {public_key} (bundle {folder})") from error
    return hashlib.sha256(raw).hexdigest()


def load_signed_bundle(folder: Path, public_key: Path | None) -> Bundle:
    """The bundle in `folder`, its signature verified before anything is read; as `load_bundle` without a key.

    Raises:
        BundleError: as `load_bundle` and `verify_signature`.
        UsageError: as `verify_signature`.
    """
    if public_key is None:
        return load_bundle(folder)
    signed = verify_signature(folder, public_key)
    bundle = load_bundle(folder)
    if bundle.digest != signed:
        raise BundleError(f"the bundle changed while it was loaded (bundle {folder})")
    return bundle


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"the key cannot be read: {(error.strerror or str(error)).lower()} ({path})") from error


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"a key to sign with is a private Ed25519 key in PEM without a password ({path})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"a key to sign with is a private Ed25519 key in PEM, got {type(key).__name__} ({path})")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"a key to verify with is a public Ed25519 key in PEM, got {path}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"a key to verify with is a public Ed25519 key in PEM, got {type(key).__name__} ({path})")
    return key
