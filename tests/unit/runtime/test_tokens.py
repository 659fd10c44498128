"""Tokens: stored hashed, compared in constant time, revocable."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.errors import UsageError
from coinfer.runtime import tokens as module
from coinfer.runtime.tokens import Tokens, add_token, read_token, read_tokens, revoke_token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def bearer(token: str) -> str:
    return f"Bearer {token}"


def test_tokens_identify_devices(path: Path) -> None:
    first, second = add_token(path, "camera-1"), add_token(path, "camera-2")
    door = Tokens(path)
    assert (door.device_of(bearer(first)), door.device_of(bearer(second))) == ("camera-1", "camera-2")
    assert door.is_known("camera-1") and not door.is_known("camera-3") and len(door) == 2
    # The scheme's case does not matter (RFC 9110, section 11.1).
    assert door.device_of(f"bearer {first}") == "camera-1"


def test_a_token_names_its_device_and_has_256_random_bits(path: Path) -> None:
    made = [add_token(path, "camera-1") for _ in range(5)]
    secrets = [token.removeprefix("camera-1.") for token in made]
    assert len(set(secrets)) == 5
    assert all(len(base64.urlsafe_b64decode(secret + "=")) == 32 for secret in secrets)


def test_tokens_are_stored_hashed(path: Path) -> None:
    token = add_token(path, "camera-1")
    text = path.read_text()
    assert token not in text and token.partition(".")[2] not in text
    entry = json.loads(text)["devices"]["camera-1"]
    assert entry["sha256"] == hashlib.sha256(token.encode()).hexdigest() and set(entry) == {"sha256", "created"}


def test_the_file_is_its_owners_alone_and_written_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.umask(os.umask(0))
    add_token(path, "camera-1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        add_token(path, "camera-2")
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_tokens_are_compared_in_constant_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hmac.compare_digest` is what decides, of an unknown device's token too."""
    token = add_token(path, "camera-1")
    door = Tokens(path)
    compared: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return verdict

    monkeypatch.setattr(hmac, "compare_digest", compare)
    verdict = True
    assert door.device_of(bearer("camera-1.wrong")) == "camera-1"
    assert door.device_of(bearer("stranger.wrong")) is None
    assert door.device_of(None) is None
    verdict = False
    assert door.device_of(bearer(token)) is None
    assert len(compared) == 4
    assert {len(a) for pair in compared for a in pair} == {64}


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token[:-1],
        lambda token: token + "A",
        lambda token: token.swapcase(),
        lambda token: "camera-2" + token.removeprefix("camera-1"),
        lambda token: "camera-1",
        lambda token: "camera-1.",
        lambda token: token.partition(".")[2],
    ],
)
def test_another_token_is_nobodys(path: Path, change) -> None:
    token = add_token(path, "camera-1")
    add_token(path, "camera-2")
    assert Tokens(path).device_of(bearer(change(token))) is None


def test_a_token_without_the_scheme_is_nobodys(path: Path) -> None:
    token = add_token(path, "camera-1")
    door = Tokens(path)
    for header in (token, f"Basic {token}", f"Bearer{token}", "", None, "Bearer", "Bearer "):
        assert door.device_of(header) is None


@given(st.text(max_size=600))
def test_any_header_is_answered(tmp_path_factory: pytest.TempPathFactory, header: str) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens.json"
    if not path.exists():
        add_token(path, "camera-1")
    assert Tokens(path).device_of(header) is None
    assert Tokens(path).device_of(f"Bearer {header}") is None


def test_a_revoked_token_is_nobodys_after_a_reload(path: Path) -> None:
    token, other = add_token(path, "camera-1"), add_token(path, "camera-2")
    door = Tokens(path)
    assert not door.has_changed()
    revoke_token(path, "camera-1")
    assert door.has_changed() and door.reload() and not door.has_changed()
    assert door.device_of(bearer(token)) is None and not door.is_known("camera-1")
    assert door.device_of(bearer(other)) == "camera-2" and door.is_known("camera-2")


def test_a_new_token_ends_those_who_came_in_by_the_old_one(path: Path) -> None:
    old = add_token(path, "camera-1")
    door = Tokens(path)
    new = add_token(path, "camera-1")
    assert door.reload()
    assert not door.is_known("camera-1")
    assert door.device_of(bearer(old)) is None and door.device_of(bearer(new)) == "camera-1"
    # Whoever came in by the new one stays, whatever is changed next.
    add_token(path, "camera-2")
    assert not door.reload() and door.is_known("camera-1")


def test_a_broken_file_on_reload_keeps_the_old_tokens(path: Path) -> None:
    token = add_token(path, "camera-1")
    door = Tokens(path)
    for content in (b"", b"{", b"[]", b'{"devices": {"a": {"sha256": "x", "created": ""}}}'):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="this is no tokens file"):
            door.reload()
        assert door.device_of(bearer(token)) == "camera-1" and door.is_known("camera-1")
    path.unlink()
    with pytest.raises(UsageError, match="the tokens file cannot be read: no such file"):
        door.reload()
    assert door.device_of(bearer(token)) == "camera-1"


def test_an_endless_file_is_refused(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, module.FILE_BYTES + 1)
    with pytest.raises(UsageError, match=f"a tokens file has at most {module.FILE_BYTES} B"):
        read_tokens(path)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "é", "x" * 65, "a\n"])
def test_a_name_is_checked(path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a device's name has 1 to 64 letters"):
        add_token(path, name)
    assert not path.exists()


def test_revoking_what_is_not_there_names_what_is(path: Path) -> None:
    add_token(path, "camera-1")
    with pytest.raises(UsageError, match="the file has no device 'camera-2'; it has camera-1"):
        revoke_token(path, "camera-2")


def test_a_devices_file_holds_its_token(path: Path, tmp_path: Path) -> None:
    token = add_token(path, "camera-1")
    (tmp_path / "token").write_text(f"{token}\n")
    assert read_token(tmp_path / "token") == token
    (tmp_path / "token").write_text("my secret password")
    with pytest.raises(UsageError, match="this is none") as caught:
        read_token(tmp_path / "token")
    assert "secret password" not in str(caught.value)
    with pytest.raises(UsageError, match="the token's file cannot be read: no such file"):
        read_token(tmp_path / "nothing")
