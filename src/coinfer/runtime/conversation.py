"""One device's connection to the edge, from its greeting to its end.

    device --> [read: event loop] --> worker threads: decode, tail, frame --> [send: event loop] --> device

The event loop reads and writes and computes nothing.  A request is handed to the workers at once, before
anything else is done for it; what can wait (the record of spans) waits until its reply has left.  One that the
workers have no time for is refused at once.

A conversation can be drained: it reads no more, answers what it has read, and says goodbye.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from math import inf
from typing import Any, NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import BusyError, ProtocolError
from ..protocol import EdgeConnection, Hello, Ping, Request
from ..protocol.messages import one_line
from .batch import Computed, Workers
from .door import whose

_LOG = logging.getLogger("coinfer.edge")
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_REFUSED = 1008
CLOSE_AWAY = 1012
CLOSE_REASON_BYTES = 120


class Conversation:
    """The requests and replies of one device on `socket`, whose greeting `connection` has yet to come.

    `sent` is called with each message that has left, `busy` with each refusal; `device` is in whose line the requests
    wait.  A device that is silent for `idle_s` is told goodbye.
    """

    def __init__(
        self,
        socket: WebSocket,
        connection: EdgeConnection,
        workers: Workers,
        sent: Callable[[Computed], None],
        *,
        device: str = "",
        busy: Callable[[Request], None] | None = None,
        idle_s: float = inf,
    ) -> None:
        self._socket = socket
        self._connection = connection
        self._workers = workers
        self._sent = sent
        self.device = device
        self._busy = busy
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(connection.limits.in_flight)
        self._computing: set[Future[Computed]] = set()
        self._sending: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._goodbye: str | None = None
        self._reading: asyncio.Task[NoReturn] | None = None
        self._ended = asyncio.Event()

    async def greet(self, within_s: float) -> str | None:
        """Why this edge does not serve that device, from its greeting; None where it does.

        Raises:
            ProtocolError: no greeting within `within_s`.
            WebSocketDisconnect: it is gone.
        """
        try:
            async with asyncio.timeout(within_s):
                message = await self._receive()
        except TimeoutError as error:
            raise ProtocolError(f"no greeting within {within_s:g} s") from error
        try:
            hello = self._connection.receive(message)
        except ProtocolError as error:
            return str(error)
        return self._connection.objection(hello) if isinstance(hello, Hello) else "no hello"

    async def welcome(self) -> None:
        """Agree."""
        await self._socket.send_text(self._connection.welcome())

    async def refuse(self, reason: str) -> None:
        """Say why not, and close."""
        await self._socket.send_text(self._connection.refusal(reason))
        await self.close(CLOSE_REFUSED, one_line(reason))

    async def close(self, code: int, reason: str) -> None:
        """Close, if the device is still there to be told."""
        try:
            await self._socket.close(code, reason.encode()[:CLOSE_REASON_BYTES].decode(errors="ignore"))
        except (WebSocketDisconnect, RuntimeError):
            _LOG.debug("nobody is there to be told: %s", reason, extra=whose(self.device))

    async def run(self) -> None:
        """Answer requests until the connection ends; then forget those that nobody waits for.

        Returns where it was drained.

        Raises:
            ProtocolError: the device sent what is no message of the protocol.
            WebSocketDisconnect: it is gone.
        """
        ended: ProtocolError | WebSocketDisconnect | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._reading = asyncio.ensure_future(self._read(group))
                try:
                    await self._reading
                except (ProtocolError, WebSocketDisconnect) as error:
                    ended = error
                except asyncio.CancelledError:
                    if self._goodbye is None:
                        raise
                    # What was read is answered.
                    await self._answer_all()
                finally:
                    self._reading.cancel()
                    self._is_over = True
                    for future in [*self._computing]:
                        future.cancel()
                    for task in self._sending:
                        task.cancel()
            if ended is not None:
                raise ended
            await self.close(CLOSE_AWAY, self._goodbye or "")
        finally:
            self._ended.set()

    async def drain(self, why: str) -> None:
        """Read no more, answer what has been read, and say goodbye; returns when that is done."""
        self._goodbye = why
        if self._reading is not None:
            self._reading.cancel()
        await self._ended.wait()

    async def _answer_all(self) -> None:
        while self._computing or self._sending:
            waits: list[asyncio.Future[Any]] = [asyncio.wrap_future(future) for future in self._computing]
            await asyncio.wait([*waits, *self._sending], return_when=asyncio.FIRST_COMPLETED)
            # What was computed is sent by a callback that runs once this has let go.
            await asyncio.sleep(0)

    async def _read(self, group: asyncio.TaskGroup) -> NoReturn:
        """Hand each request to the workers; at most `in_flight` of them are unanswered, else nothing is read."""
        workers = self._workers
        while True:
            await self._slots.acquire()
            event = self._connection.receive(await self._receive_soon())
            if isinstance(event, Request):
                arrived_s = time.perf_counter()
                try:
                    future = workers.submit(self._connection, event, arrived_s, device=self.device)
                except BusyError as error:
                    self._slots.release()
                    await self._socket.send_bytes(self._connection.busy(event.request, error.retry_after_s))
                    if self._busy is not None:
                        self._busy(event)
                    continue
                self._computing.add(future)
                future.add_done_callback(partial(self._call_loop, group))
                continue
            self._slots.release()
            if isinstance(event, Ping):
                await self._socket.send_bytes(self._connection.pong(event.token))

    async def _receive_soon(self) -> str | bytes:
        """The device's next message, within `idle_s`.

        Raises:
            ProtocolError: nothing came.
        """
        if self._idle_s == inf:
            return await self._receive()
        try:
            async with asyncio.timeout(self._idle_s):
                return await self._receive()
        except TimeoutError as error:
            raise ProtocolError(f"silent for {self._idle_s:g} s") from error

    def _call_loop(self, group: asyncio.TaskGroup, future: Future[Computed]) -> None:
        """In the thread that ended a computation: have the event loop send what came of it."""
        if not future.cancelled():
            self._loop.call_soon_threadsafe(self._begin_send, group, future)

    def _begin_send(self, group: asyncio.TaskGroup, future: Future[Computed]) -> None:
        self._computing.discard(future)
        if not self._is_over:
            task = group.create_task(self._send(future))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, future: Future[Computed]) -> None:
        computed = future.result()
        try:
            await self._socket.send_bytes(computed.message)
        except WebSocketDisconnect:
            request = computed.request
            known = {**whose(self.device), "request": request.request, "plan": request.plan.number}
            _LOG.info("request %d has its answer, but its device is gone", request.request, extra=known)
        self._slots.release()
        self._sent(computed)

    async def _receive(self) -> str | bytes:
        """The device's next message."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        content: str | bytes | None = message.get("bytes")
        return message["text"] if content is None else content
