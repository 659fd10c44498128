"""The edge as an ASGI app: decodes, runs tails, answers.

    GET  /healthz     what this edge holds and has done, as JSON
    WS   /link (or /) the link of `coinfer.protocol`

One task reads each connection and hands its requests to a pool of worker threads, so the event loop
computes nothing; replies leave as they are done, with this machine's own durations.  With too many
requests of one device in flight its connection is not read until one is answered: the transport holds
the device back.  A payload that cannot be decoded fails that request; a message that is not of the
protocol ends the connection with a line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import NamedTuple, NoReturn

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..bundle import Bundle
from ..errors import CodecError, EngineError, PlanError, ProtocolError
from ..plan import Value
from ..protocol import (
    PROTOCOL_VERSION,
    Durations,
    EdgeConnection,
    Hello,
    Limits,
    Ping,
    Request,
    Terms,
)
from ..protocol.messages import one_line
from ..timeline import Span, Timeline
from .pace import AsFastAsItGoes, Loaded, Pace
from .recent import RecentTimeline
from .segments import Segments

_LOG = logging.getLogger("coinfer.edge")
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_REFUSED = 1008
CLOSE_REASON_BYTES = 120


class EdgeLimits(Value, frozen=True):
    """What an edge takes.

    `max_message_bytes` None: what the menu's largest request may need.  `hello_s` is how long a new connection
    may take to greet.
    """

    max_message_bytes: int | None = None
    in_flight: int = 32
    connections: int = 64
    hello_s: float = 10.0


class _Computed(NamedTuple):
    """A message to send: a reply, or a failure."""

    is_reply: bool
    message: bytes


class Edge:
    """What the app's routes share: the loaded bundle, the worker threads, the counts.

    Every tail and codec of the menu is loaded here, once, and shared by all connections.

    Raises:
        BundleError: a segment does not fit its plan.
        EngineError: a segment does not load.
        PlanError: `workers` is below 1, or both a pace and a load are given.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        workers: int = 1,
        threads: int = 1,
        load: float = 1.0,
        pace: Pace | None = None,
        limits: EdgeLimits | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        if workers < 1:
            raise PlanError(f"an edge needs at least 1 worker, got {workers}")
        if pace is not None and load != 1.0:
            raise PlanError(f"give an edge a pace or a load, not both (load {load})")
        self.bundle = bundle
        self.terms = Terms.of(bundle)
        self.timeline = RecentTimeline() if timeline is None else timeline
        self.requests = self.failures = self.connections = 0
        self._pace: Pace = pace or (AsFastAsItGoes() if load == 1.0 else Loaded(load))
        self._limits = EdgeLimits() if limits is None else limits
        self._segments = Segments(bundle, threads=threads)
        for plan in self.terms.plans.values():
            self._segments.tail(plan)
            self._segments.codec(plan)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="coinfer-edge")

    @property
    def limits(self) -> Limits:
        """What a welcome tells the device."""
        most = self._limits.max_message_bytes
        return Limits(
            max_message_bytes=self.terms.max_request_bytes() if most is None else most,
            in_flight=self._limits.in_flight,
        )

    def close(self) -> None:
        """End the worker threads, each behind the request it is at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def healthz(self, request: HttpRequest) -> JSONResponse:
        """What this edge holds and has done."""
        return JSONResponse(
            {
                "status": "ok",
                "protocol": PROTOCOL_VERSION,
                "model": self.bundle.manifest.model,
                "bundle": self.bundle.digest,
                "plans": sorted(self.terms.plans),
                "connections": self.connections,
                "requests": self.requests,
                "failures": self.failures,
            }
        )

    async def link(self, socket: WebSocket) -> None:
        """One device's connection, from its greeting to its end."""
        await socket.accept()
        connection = EdgeConnection(self.terms, self.limits)
        peer = f"{socket.client.host}:{socket.client.port}" if socket.client is not None else "a device"
        self.connections += 1
        try:
            if await self._greet(socket, connection, peer):
                await self._converse(socket, connection)
        except ProtocolError as error:
            line = one_line(str(error))
            _LOG.warning("closed the link to %s: %s", peer, line)
            await _close(socket, CLOSE_PROTOCOL_ERROR, line)
        except WebSocketDisconnect:
            _LOG.info("%s is gone", peer)
        finally:
            self.connections -= 1

    async def _greet(self, socket: WebSocket, connection: EdgeConnection, peer: str) -> bool:
        """Whether device and edge agree; where not, the device has been told why."""
        try:
            async with asyncio.timeout(self._limits.hello_s):
                message = await _receive(socket)
        except TimeoutError as error:
            raise ProtocolError(f"no greeting within {self._limits.hello_s:g} s") from error
        try:
            hello = connection.receive(message)
            reason = connection.objection(hello) if isinstance(hello, Hello) else "no hello"
        except ProtocolError as error:
            reason = str(error)
        if self.connections > self._limits.connections:
            reason = f"this edge already serves {self._limits.connections} connections"
        if reason is None:
            await socket.send_text(connection.welcome())
            return True
        _LOG.warning("refused %s: %s", peer, one_line(reason))
        await socket.send_text(connection.refusal(reason))
        await _close(socket, CLOSE_REFUSED, one_line(reason))
        return False

    async def _converse(self, socket: WebSocket, connection: EdgeConnection) -> None:
        """Answer requests until the connection ends; then forget those that nobody waits for."""
        answering: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            try:
                await self._read(socket, connection, group, answering)
            except (ProtocolError, WebSocketDisconnect) as error:
                ended = error
                for task in answering:
                    task.cancel()
        raise ended

    async def _read(
        self,
        socket: WebSocket,
        connection: EdgeConnection,
        group: asyncio.TaskGroup,
        answering: set[asyncio.Task[None]],
    ) -> NoReturn:
        """Begin an answer for each request read; at most `in_flight` of them at once."""
        slots = asyncio.Semaphore(self._limits.in_flight)

        def answered(task: asyncio.Task[None]) -> None:
            answering.discard(task)
            slots.release()

        while True:
            await slots.acquire()
            event = connection.receive(await _receive(socket))
            if isinstance(event, Request):
                task = group.create_task(self._answer(socket, connection, event, time.perf_counter()))
                answering.add(task)
                task.add_done_callback(answered)
                continue
            slots.release()
            if isinstance(event, Ping):
                await socket.send_bytes(connection.pong(event.token))

    async def _answer(self, socket: WebSocket, connection: EdgeConnection, request: Request, arrived_s: float) -> None:
        """Have a worker compute one reply, and send it."""
        self.requests += 1
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._pool, self._compute, connection, request, arrived_s)
        self.failures += not answer.is_reply
        try:
            await socket.send_bytes(answer.message)
        except WebSocketDisconnect:
            _LOG.info("request %d has its answer, but its device is gone", request.request)

    def _compute(self, connection: EdgeConnection, request: Request, arrived_s: float) -> _Computed:
        """In a worker thread: decode, run the tail, and frame the reply or the failure."""
        plan = request.plan
        codec, tail = self._segments.codec(plan), self._segments.tail(plan)
        begun_s = time.perf_counter()
        try:
            arrays = self._pace.run("fp32", lambda: codec.decode(request.payload))
            decoded_s = time.perf_counter()
            outputs = self._pace.run(plan.precision, lambda: tail.run(arrays))
        except (CodecError, EngineError) as error:
            _LOG.warning("request %d failed: %s", request.request, one_line(str(error)))
            return _Computed(False, connection.failure(request.request, str(error)))
        stamps_s = (arrived_s, begun_s, decoded_s, time.perf_counter())
        self.timeline.add(*_spans(request, stamps_s))
        durations = (round((b - a) * 1e6) for a, b in pairwise(stamps_s))
        return _Computed(True, connection.reply(request.request, Durations(*durations), outputs))


def _spans(request: Request, stamps_s: tuple[float, ...]) -> list[Span]:
    """Wait, decode and tail on the edge's clock, which starts at the arrival of the request."""
    sizes = {"wait": len(request.payload)}
    return [
        Span(
            request=request.request,
            stage=stage,
            start_s=stamps_s[index] - stamps_s[0],
            end_s=stamps_s[index + 1] - stamps_s[0],
            clock="edge",
            num_bytes=sizes.get(stage, 0),
        )
        for index, stage in enumerate(("wait", "decode", "tail"))
    ]


async def _receive(socket: WebSocket) -> str | bytes:
    """The device's next message.

    Raises:
        WebSocketDisconnect: it is gone.
    """
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    content: str | bytes | None = message.get("bytes")
    return message["text"] if content is None else content


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    """Close, if the device is still there to be told."""
    try:
        await socket.close(code, reason.encode()[:CLOSE_REASON_BYTES].decode(errors="ignore"))
    except (WebSocketDisconnect, RuntimeError):
        _LOG.debug("nobody is there to be told: %s", reason)


def make_app(
    bundle: Bundle,
    *,
    workers: int = 1,
    threads: int = 1,
    load: float = 1.0,
    pace: Pace | None = None,
    limits: EdgeLimits | None = None,
    timeline: Timeline | None = None,
) -> Starlette:
    """An ASGI app that serves `bundle`; `app.state.edge` is its Edge.

    Args:
        bundle: what to serve.
        workers: threads that decode and run tails.
        threads: threads of each session.
        load: emulated: decoding and tails take that many times as long.
        pace: another emulation in place of `load`.
        limits: caps.
        timeline: where spans go; a bounded record by default.

    Raises:
        BundleError, EngineError, PlanError: as `Edge`.
    """
    edge = Edge(bundle, workers=workers, threads=threads, load=load, pace=pace, limits=limits, timeline=timeline)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        edge.close()

    app = Starlette(
        routes=[
            Route("/healthz", edge.healthz),
            WebSocketRoute("/link", edge.link),
            WebSocketRoute("/", edge.link),
        ],
        lifespan=lifespan,
    )
    app.state.edge = edge
    return app
