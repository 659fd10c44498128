"""One device's connection to the edge, from its greeting to its end.

    device --> [read: event loop] --> worker threads: decode, tail, frame --> [send: event loop] --> device

The event loop reads and writes and computes nothing.  A request is handed to the workers at once, before
anything else is done for it; what can wait (the record of spans) waits until its reply has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from itertools import pairwise
from typing import NamedTuple, NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from ..engine.segments import Segments
from ..engine.sides import run_side
from ..errors import CodecError, EngineError, ProtocolError
from ..protocol import Durations, EdgeConnection, Hello, Ping, Request
from ..protocol.messages import one_line
from ..timeline import Span
from .pace import Pace

_LOG = logging.getLogger("coinfer.edge")
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_REFUSED = 1008
CLOSE_REASON_BYTES = 120


class Computed(NamedTuple):
    """What a worker made of a request: a message to send, and the moments of its making.

    `stamps_s` are arrival, begin, decoded, done on this machine's clock; empty for a failure.
    """

    request: Request
    message: bytes
    stamps_s: tuple[float, ...]

    def spans(self) -> list[Span]:
        """Wait, decode and tail, on a clock that starts at the arrival of the request."""
        return [
            Span(
                request=self.request.request,
                stage=stage,
                start_s=begin_s - self.stamps_s[0],
                end_s=end_s - self.stamps_s[0],
                clock="edge",
            )
            for stage, (begin_s, end_s) in zip(("wait", "decode", "tail"), pairwise(self.stamps_s), strict=False)
        ]


class Workers(NamedTuple):
    """Where requests are computed, with what, and how fast."""

    pool: Executor
    segments: Segments
    pace: Pace

    def compute(self, connection: EdgeConnection, request: Request, arrived_s: float) -> Computed:
        """In a worker thread: decode, run the tail, and frame the reply, or the failure."""
        plan = request.plan
        codec = self.segments.codec(plan)
        begun_s = time.perf_counter()
        try:
            arrays = self.pace.run("fp32", lambda: codec.decode(request.payload))
            decoded_s = time.perf_counter()
            found = run_side(plan, "edge", self.segments, arrays, run=self.pace.run)
        except (CodecError, EngineError) as error:
            _LOG.warning("request %d failed: %s", request.request, one_line(str(error)))
            return Computed(request, connection.failure(request.request, str(error)), ())
        stamps_s = (arrived_s, begun_s, decoded_s, time.perf_counter())
        durations = Durations(*(round((b - a) * 1e6) for a, b in pairwise(stamps_s)))
        message = connection.reply(request.request, durations, found.values, exit=found.exit)
        return Computed(request, message, stamps_s)


class Conversation:
    """The requests and replies of one device on `socket`, whose greeting `connection` has yet to come.

    `sent` is called with each message that has left.
    """

    def __init__(
        self,
        socket: WebSocket,
        connection: EdgeConnection,
        workers: Workers,
        sent: Callable[[Computed], None],
    ) -> None:
        self._socket = socket
        self._connection = connection
        self._workers = workers
        self._sent = sent
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(connection.limits.in_flight)
        self._computing: set[Future[Computed]] = set()
        self._sending: set[asyncio.Task[None]] = set()
        self._is_over = False

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
            _LOG.debug("nobody is there to be told: %s", reason)

    async def run(self) -> NoReturn:
        """Answer requests until the connection ends; then forget those that nobody waits for.

        Raises:
            ProtocolError: the device sent what is no message of the protocol.
            WebSocketDisconnect: it is gone.
        """
        async with asyncio.TaskGroup() as group:
            try:
                await self._read(group)
            except (ProtocolError, WebSocketDisconnect) as error:
                ended = error
            finally:
                self._is_over = True
                for future in [*self._computing]:
                    future.cancel()
                for task in self._sending:
                    task.cancel()
        raise ended

    async def _read(self, group: asyncio.TaskGroup) -> NoReturn:
        """Hand each request to the workers; at most `in_flight` of them are unanswered, else nothing is read."""
        workers = self._workers
        while True:
            await self._slots.acquire()
            event = self._connection.receive(await self._receive())
            if isinstance(event, Request):
                arrived_s = time.perf_counter()
                future = workers.pool.submit(workers.compute, self._connection, event, arrived_s)
                self._computing.add(future)
                future.add_done_callback(partial(self._call_loop, group))
                continue
            self._slots.release()
            if isinstance(event, Ping):
                await self._socket.send_bytes(self._connection.pong(event.token))

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
            _LOG.info("request %d has its answer, but its device is gone", computed.request.request)
        self._slots.release()
        self._sent(computed)

    async def _receive(self) -> str | bytes:
        """The device's next message."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        content: str | bytes | None = message.get("bytes")
        return message["text"] if content is None else content
