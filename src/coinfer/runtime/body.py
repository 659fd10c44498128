"""The body of one HTTP request, under caps: how long it may be, how long it may take, what is held of one device.

A client that is still writing does not read, and one whose connection is closed under its hands may never see why.  So
what is refused is still read to its end and forgotten, as far as that is cheap; `drop` says whether it came to that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ..errors import BusyError

# What a refused body may have, as a multiple of its cap, to be read to its end.
_DROPPED = 4
# Bodies of all devices together may have so many times what those of one may.
_ALL_DEVICES = 4
_RETRY_S = 1.0


class Held:
    """Bytes of bodies that are held, by whom they came from: of one device up to `most`, of all four times that."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: dict[str, int] = {}
        self.num_bytes = 0

    def take(self, device: str, num_bytes: int) -> None:
        """Count bytes that are about to be kept.

        Raises:
            BusyError: they would be too many; they are not counted.
        """
        mine = self._of.get(device, 0) + num_bytes
        if mine > self._most or self.num_bytes + num_bytes > _ALL_DEVICES * self._most:
            whose = "this device" if mine > self._most else "all devices"
            raise BusyError(f"too many bytes of {whose} are held", retry_after_s=_RETRY_S)
        self._of[device] = mine
        self.num_bytes += num_bytes

    def give(self, device: str, num_bytes: int) -> None:
        """Count bytes that are kept no more."""
        self.num_bytes -= num_bytes
        left = self._of.pop(device, 0) - num_bytes
        if left > 0:
            self._of[device] = left


class Body:
    """One request's.

    Args:
        request: whose body nobody else reads.
        most: bytes it may have.
        within_s: seconds from now in which it has to arrive.
        hold: is told of bytes that are kept, `num_held` in all; may refuse by an error.
    """

    def __init__(self, request: Request, most: int, within_s: float, hold: Callable[[int], None]) -> None:
        self._request, self._most, self._within_s, self._hold = request, most, within_s, hold
        self._end_s = asyncio.get_running_loop().time() + within_s
        self._num_read = 0
        self.num_held = 0
        self.is_over = False

    async def read(self) -> bytes:
        """All of it.

        Raises:
            HTTPException: 413 too long, by its own word or in truth; 408 too slow; 400 a length that is none; 415 it
                is compressed.
            ClientDisconnect: the client is gone.
            BusyError: `hold` refuses.
        """
        coding = self._request.headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            raise HTTPException(415, f'a body is sent as it is, got Content-Encoding "{coding[:32]}"')
        if (self._declared() or 0) > self._most:
            raise self._too_long(f"{self._declared()} B")
        content = bytearray()
        while not self.is_over:
            chunk = await self._chunk()
            if self._num_read > self._most:
                raise self._too_long(f"{self._num_read} B or more")
            self._hold(len(chunk))
            self.num_held += len(chunk)
            content += chunk
        return bytes(content)

    async def drop(self) -> bool:
        """Read what is left and forget it; whether all has come, so that the connection can be used again."""
        most = _DROPPED * self._most
        # Who waits to be told to send has sent nothing.
        if "expect" in self._request.headers or (self._declared() or 0) > most:
            return self.is_over
        try:
            while not self.is_over and self._num_read <= most:
                await self._chunk()
        except (HTTPException, ClientDisconnect):
            return False
        return self.is_over

    def _declared(self) -> int | None:
        text = self._request.headers.get("content-length")
        # The server has checked it to be digits.
        return int(text) if text is not None and text.isascii() and text.isdigit() else None

    def _too_long(self, given: str) -> HTTPException:
        return HTTPException(413, f"a body may have {self._most} B, got {given}")

    async def _chunk(self) -> bytes:
        try:
            async with asyncio.timeout_at(self._end_s):
                message = await self._request.receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {self._within_s:g} s") from error
        if message["type"] != "http.request":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        self._num_read += len(chunk)
        self.is_over = not message.get("more_body", False)
        return chunk
