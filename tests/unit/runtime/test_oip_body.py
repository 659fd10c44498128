"""Caps of a request's body, chunk by chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from coinfer.errors import BusyError
from coinfer.runtime.body import Body, Held

PATIENCE_S = 30.0


class Client:
    """What a client sends: chunks, then nothing more; `num_taken` of them were read."""

    def __init__(self, *chunks: bytes, ends: bool = True, headers: dict[str, str] | None = None) -> None:
        self._messages = self._all(chunks, ends)
        self._headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.num_taken = 0

    @staticmethod
    def _all(chunks: tuple[bytes, ...], ends: bool) -> Iterator[dict[str, Any]]:
        for place, chunk in enumerate(chunks):
            yield {"type": "http.request", "body": chunk, "more_body": not ends or place < len(chunks) - 1}

    async def receive(self) -> dict[str, Any]:
        for message in self._messages:
            self.num_taken += 1
            return message
        await asyncio.Event().wait()
        raise AssertionError

    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "headers": self._headers}, self.receive)


def read(client: Client, most: int, *, within_s: float = PATIENCE_S, hold: Any = lambda n: None) -> bytes:
    async def run() -> bytes:
        return await Body(client.request(), most, within_s, hold).read()

    return asyncio.run(run())


def test_a_body_of_just_the_cap_is_read() -> None:
    client = Client(b"abc", b"", b"defg", headers={"content-length": "7"})
    assert read(client, 7) == b"abcdefg"


def test_a_length_over_the_cap_is_refused_before_anything_is_read() -> None:
    client = Client(b"abc", headers={"content-length": "8"})
    with pytest.raises(HTTPException) as raised:
        read(client, 7)
    assert (raised.value.status_code, raised.value.detail) == (413, "a body may have 7 B, got 8 B")
    assert client.num_taken == 0


@pytest.mark.parametrize("headers", [{}, {"content-length": "3"}])
def test_what_comes_over_the_cap_is_refused_as_it_comes(headers: dict[str, str]) -> None:
    client = Client(*[b"1234"] * 50, headers=headers)
    with pytest.raises(HTTPException) as raised:
        read(client, 7)
    assert (raised.value.status_code, raised.value.detail) == (413, "a body may have 7 B, got 8 B or more")
    assert client.num_taken == 2


def test_a_body_that_stops_coming_is_given_up() -> None:
    with pytest.raises(HTTPException) as raised:
        read(Client(b"abc", ends=False), 7, within_s=0.01)
    assert (raised.value.status_code, raised.value.detail) == (408, "the body did not arrive within 0.01 s")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, identity", "x"])
def test_a_coded_body_is_refused_before_anything_is_read(coding: str) -> None:
    client = Client(b"abc", headers={"content-encoding": coding})
    with pytest.raises(HTTPException) as raised:
        read(client, 7)
    assert raised.value.status_code == 415 and client.num_taken == 0
    assert read(Client(b"abc", headers={"content-encoding": " Identity "}), 7) == b"abc"


def test_a_client_that_is_gone_is_noticed() -> None:
    class Gone(Client):
        async def receive(self) -> dict[str, Any]:
            return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        read(Gone(), 7)


def dropped(client: Client, most: int, *, within_s: float = PATIENCE_S) -> bool:
    async def run() -> bool:
        return await Body(client.request(), most, within_s, lambda n: None).drop()

    return asyncio.run(run())


def test_what_is_refused_is_read_to_its_end_where_that_is_cheap() -> None:
    client = Client(*[b"1234"] * 7)
    assert dropped(client, 7) and client.num_taken == 7
    client = Client(*[b"1234"] * 50)
    assert not dropped(client, 7) and client.num_taken == 8
    for headers in ({"content-length": "29"}, {"expect": "100-continue"}):
        client = Client(b"1234", headers=headers)
        assert not dropped(client, 7) and client.num_taken == 0
    assert not dropped(Client(b"1", ends=False), 7, within_s=0.01)


def test_bytes_of_a_device_and_of_all_are_counted() -> None:
    held = Held(10)
    held.take("a", 10)
    with pytest.raises(BusyError, match="too many bytes of this device are held"):
        held.take("a", 1)
    for name in "bcd":
        held.take(name, 10)
    with pytest.raises(BusyError, match="too many bytes of all devices are held"):
        held.take("e", 1)
    assert held.num_bytes == 40
    held.give("a", 10)
    held.take("e", 10)
    for name in "bcde":
        held.give(name, 10)
    assert held.num_bytes == 0
    held.take("a", 10)


def test_what_cannot_be_held_is_not_counted_as_held() -> None:
    held = Held(5)

    async def run() -> Body:
        body = Body(Client(b"1234", b"56").request(), 100, PATIENCE_S, lambda n: held.take("a", n))
        with pytest.raises(BusyError):
            await body.read()
        return body

    body = asyncio.run(run())
    assert (body.num_held, held.num_bytes) == (4, 4)
    held.give("a", body.num_held)
    held.take("a", 5)
