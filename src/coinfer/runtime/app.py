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

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..bundle import Bundle
from ..engine.segments import Segments
from ..errors import PlanError, ProtocolError
from ..plan import Value
from ..protocol import PROTOCOL_VERSION, EdgeConnection, Limits, Terms
from ..protocol.messages import one_line
from ..timeline import Timeline
from .batch import Computed, Workers
from .conversation import CLOSE_PROTOCOL_ERROR, Conversation
from .pace import AsFastAsItGoes, Loaded, Pace
from .recent import RecentTimeline

_LOG = logging.getLogger("coinfer.edge")


class EdgeLimits(Value, frozen=True, kw_only=True):
    """What an edge takes.

    `max_message_bytes` None: what the menu's largest request may need.  `hello_s` is how long a new connection
    may take to greet.
    """

    max_message_bytes: int | None = None
    in_flight: int = 32
    connections: int = 64
    hello_s: float = 10.0


class Edge:
    """What the app's routes share: the loaded bundle, the worker threads, the counts.

    Every tail and codec of the menu is loaded here, once, and shared by all connections.

    Raises:
        BundleError: a segment does not fit its plan.
        EngineError: a segment does not load.
        PlanError: `workers` or `max_batch` is below 1, or both a pace and a load are given.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        workers: int = 1,
        threads: int = 1,
        max_batch: int = 1,
        batch_wait_s: float = 0.0,
        load: float = 1.0,
        pace: Pace | None = None,
        limits: EdgeLimits | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        if pace is not None and load != 1.0:
            raise PlanError(f"give an edge a pace or a load, not both (load {load})")
        self.bundle = bundle
        self.terms = Terms.of(bundle)
        self.timeline = RecentTimeline() if timeline is None else timeline
        self.requests = self.failures = self.connections = self.largest_batch = 0
        self._limits = EdgeLimits() if limits is None else limits
        segments = Segments(bundle.path, bundle.manifest.outputs, threads=threads)
        for plan in self.terms.plans.values():
            segments.parts(plan, "edge")
            segments.codec(plan)
        self._workers = Workers(
            segments,
            pace or (AsFastAsItGoes() if load == 1.0 else Loaded(load)),
            workers=workers,
            max_batch=max_batch,
            batch_wait_s=batch_wait_s,
        )

    @property
    def limits(self) -> Limits:
        """What a welcome tells the device."""
        most = self._limits.max_message_bytes
        return Limits(
            max_message_bytes=self.terms.max_request_bytes() if most is None else most,
            in_flight=self._limits.in_flight,
        )

    def close(self) -> None:
        """End the worker threads, each behind the batch it is at."""
        self._workers.close()

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
                "largest_batch": self.largest_batch,
            }
        )

    async def link(self, socket: WebSocket) -> None:
        """One device's connection, from its greeting to its end."""
        await socket.accept()
        connection = EdgeConnection(self.terms, self.limits)
        talk = Conversation(socket, connection, self._workers, self._record)
        peer = f"{socket.client.host}:{socket.client.port}" if socket.client is not None else "a device"
        self.connections += 1
        try:
            reason = await talk.greet(self._limits.hello_s)
            if self.connections > self._limits.connections:
                reason = f"this edge already serves {self._limits.connections} connections"
            if reason is None:
                await talk.welcome()
                await talk.run()
            else:
                _LOG.warning("refused %s: %s", peer, one_line(reason))
                await talk.refuse(reason)
        except ProtocolError as error:
            line = one_line(str(error))
            _LOG.warning("closed the link to %s: %s", peer, line)
            await talk.close(CLOSE_PROTOCOL_ERROR, line)
        except WebSocketDisconnect:
            _LOG.info("%s is gone", peer)
        finally:
            self.connections -= 1

    def _record(self, computed: Computed) -> None:
        self.requests += 1
        self.failures += not computed.durations_s
        self.largest_batch = max(self.largest_batch, computed.batch)
        self.timeline.add(*computed.spans())


def make_app(
    bundle: Bundle,
    *,
    workers: int = 1,
    threads: int = 1,
    max_batch: int = 1,
    batch_wait_s: float = 0.0,
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
        max_batch: requests of one plan that a worker computes together at most.
        batch_wait_s: how long a request may wait for others to be computed with.
        load: emulated: decoding and tails take that many times as long.
        pace: another emulation in place of `load`.
        limits: caps.
        timeline: where spans go; a bounded record by default.

    Raises:
        BundleError, EngineError, PlanError: as `Edge`.
    """
    edge = Edge(
        bundle, workers=workers, threads=threads, max_batch=max_batch, batch_wait_s=batch_wait_s,
        load=load, pace=pace, limits=limits, timeline=timeline,
    )  # fmt: skip

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
