"""Who may come in by a token: one file, which may change while the edge runs.

A token is `NAME.SECRET`: the name of a device, for people to read, and 256 random bits.  The file holds no token, only
what one is recognised by:

    {"devices": {"camera-3": {"sha256": "9f86d0...", "created": "2025-01-02T03:04:05+00:00"}}}

(JSON, since the file is written as well as read.)  A secret of 256 bits cannot be guessed, so a plain sha256 protects
it as a slow hash protects a password.  Tokens are compared in constant time, one of an unknown device too.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ..errors import UsageError
from ..plan import Value

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SECRET_BYTES = 32
# Of a tokens file: ten thousand devices and more.
FILE_BYTES = 4 << 20
_TOKEN_CHARACTERS = 256
_NOBODY = "0" * 64
_SCHEME = "bearer "


class TokenEntry(Value, frozen=True, kw_only=True):
    """What a device's token is recognised by, and since when it is valid (ISO 8601, UTC)."""

    sha256: str
    created: str


class TokenFile(Value, frozen=True, kw_only=True):
    """What a tokens file holds, by the names of devices."""

    devices: dict[str, TokenEntry] = {}


def read_tokens(path: Path) -> TokenFile:
    """What a tokens file holds.

    Raises:
        UsageError: it cannot be read, or is no tokens file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the tokens file cannot be read: {reason} ({path}; `coinfer token add` makes one)") from error
    try:
        if len(raw) > FILE_BYTES:
            raise UsageError(f"a tokens file has at most {FILE_BYTES} B ({path})")
        held = msgspec.json.decode(raw, type=TokenFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"this is no tokens file: {error} ({path})") from error
    for name, entry in held.devices.items():
        if NAME.fullmatch(name) is None or re.fullmatch("[0-9a-f]{64}", entry.sha256) is None:
            raise UsageError(f"this is no tokens file: device {name!a:.80} has no name or no sha256 ({path})")
    return held


def add_token(path: Path, name: str) -> str:
    """A new token for a device, whose hash is added to the file; an earlier token of that device is no longer valid.

    Raises:
        UsageError: `name` is none, or the file is no tokens file.
        OSError: the file cannot be written.
    """
    if NAME.fullmatch(name) is None:
        raise UsageError(f"a device's name has 1 to 64 letters, digits, - and _, got {name!a:.80}")
    held = read_tokens(path) if path.exists() else TokenFile()
    token = f"{name}.{secrets.token_urlsafe(SECRET_BYTES)}"
    entry = TokenEntry(sha256=_hash(token), created=datetime.now(UTC).isoformat(timespec="seconds"))
    _write(path, TokenFile(devices={**held.devices, name: entry}))
    return token


def revoke_token(path: Path, name: str) -> None:
    """Take a device's token out of the file.

    Raises:
        UsageError: the file has no such device, or is no tokens file.
        OSError: the file cannot be written.
    """
    held = read_tokens(path)
    if name not in held.devices:
        have = ", ".join(sorted(held.devices)) or "none"
        raise UsageError(f"the file has no device {name!a:.80}; it has {have:.500} ({path})")
    _write(path, TokenFile(devices={other: entry for other, entry in held.devices.items() if other != name}))


def read_token(path: Path) -> str:
    """The token that a device's file holds.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(4 * _TOKEN_CHARACTERS).decode("ascii", errors="replace").strip()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the token's file cannot be read: {reason} ({path})") from error
    return checked_token(text, str(path))


def checked_token(text: str, where: str) -> str:
    """A token as it is, if it has the form of one; its text never is in a message.

    Raises:
        UsageError: it has not.
    """
    name, _, secret = text.partition(".")
    if NAME.fullmatch(name) is None or re.fullmatch(r"[A-Za-z0-9_-]{20,128}", secret) is None:
        raise UsageError(f"a token is NAME.SECRET as `coinfer token add` prints it; this is none ({where})")
    return text


class Tokens:
    """A `Door` that lets in whoever holds a token of the file at `path`; read when made and on `reload`.

    Raises:
        UsageError: it cannot be read, or is no tokens file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _stamp(path)
        self._devices = read_tokens(path).devices
        self._renewed: set[str] = set()

    def __len__(self) -> int:
        return len(self._devices)

    def device_of(self, authorization: str | None) -> str | None:
        """The device whose token an Authorization header holds, or None."""
        text = authorization or ""
        token = text[len(_SCHEME) :].strip() if text[: len(_SCHEME)].lower() == _SCHEME else ""
        name = token[:_TOKEN_CHARACTERS].partition(".")[0]
        entry = self._devices.get(name)
        # One of an unknown device is hashed and compared as well: an answer takes as long as any other.
        expected = _NOBODY if entry is None else entry.sha256
        is_right = hmac.compare_digest(_hash(token[: 2 * _TOKEN_CHARACTERS]), expected)
        return name if is_right and entry is not None else None

    def is_known(self, device: str) -> bool:
        """Whether a device that came in before the latest reload still would: with the token that it had then."""
        return device in self._devices and device not in self._renewed

    def has_changed(self) -> bool:
        """Whether the file is another one than was read."""
        return _stamp(self.path) != self._seen

    def reload(self) -> bool:
        """Read the file anew; whether devices lost their token by it.  A broken file changes nothing.

        Raises:
            UsageError: it cannot be read, or is no tokens file.
        """
        self._seen = _stamp(self.path)
        fresh = read_tokens(self.path).devices
        kept = {name for name, entry in self._devices.items() if name in fresh and fresh[name].sha256 == entry.sha256}
        lost = set(self._devices) - kept
        self._devices, self._renewed = fresh, lost & set(fresh)
        return bool(lost)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, ...]:
    """Which file lies there, and since when; nothing where none does."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _write(path: Path, held: TokenFile) -> None:
    """The file whole or not at all, readable by its owner alone from its first byte on."""
    content = msgspec.json.format(msgspec.json.encode(held), indent=1)
    # mkstemp gives mode 0600, and a rename keeps it.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
