"""The edge as an ASGI app: decodes, runs tails, answers.

    GET  /healthz       whether this process lives; with a token, what it holds and has done
    GET  /readyz        whether it takes requests
    GET  /metrics       counts, for Prometheus
    WS   /link (or /)   the link of `coinfer.protocol`
    /v2/...             the Open Inference Protocol (`oip`)

One task reads each connection and hands its requests to a pool of worker threads, so the event loop
computes nothing; replies leave as they are done, with this machine's own durations.  With too many
requests of one device in flight its connection is not read until one is answered: the transport holds
the device back.  A payload that cannot be decoded fails that request; a message that is not of the
protocol ends the connection with a line in the log.

What is served can be replaced while it runs (`Edge.reload`), and an edge can be drained (`Edge.drain`): it answers
what it has read, says goodbye to every device, and takes nothing more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..bundle import Bundle
from ..engine.segments import Segments
from ..errors import PlanError, ProtocolError
from ..plan import Value
from ..protocol import PROTOCOL_VERSION, EdgeConnection, Limits, Request, Terms
from ..protocol.messages import one_line
from ..timeline import Timeline
from . import answers
from .answers import client_of, unauthorised
from .batch import Computed, Workers
from .conversation import CLOSE_AWAY, CLOSE_PROTOCOL_ERROR, Conversation
from .door import Door, OpenDoor
from .metrics import EdgeMetrics
from .oip import OpenInference
from .oip_models import offered
from .pace import AsFastAsItGoes, Loaded, Pace
from .recent import RecentTimeline
from .refusals import Refusals
from .traces import Timed, Tracer

_LOG = logging.getLogger("coinfer.edge")
_KEPT = 10_000


class EdgeLimits(Value, frozen=True, kw_only=True):
    """What an edge takes.

    `max_message_bytes` None: what the menu's largest request may need.  `hello_s` is how long a new connection
    may take to greet, `idle_s` how long it may say nothing (a device's heartbeat counts).  `connections` are those of
    all devices, `device_connections` those of one; `in_flight` its unanswered requests on each of them, `device_bytes`
    what of them may wait.  A request that would wait longer than `max_wait_s` is refused, and is told when to ask
    again.  A request over HTTP has up to `samples` samples in a body of up to `body_bytes`, which arrives within
    `hello_s`.
    """

    max_message_bytes: int | None = None
    in_flight: int = 32
    connections: int = 256
    device_connections: int = 8
    device_bytes: int = 64 << 20
    body_bytes: int = 16 << 20
    samples: int = 256
    max_wait_s: float = 2.0
    hello_s: float = 10.0
    idle_s: float = 120.0

    def __post_init__(self) -> None:
        whole = (self.in_flight, self.connections, self.device_connections, self.device_bytes)
        if min(*whole, self.body_bytes, self.samples) < 1 or not min(self.max_wait_s, self.hello_s, self.idle_s) > 0:
            raise PlanError(f"an edge's limits must be above 0, got {self}")


class Serving:
    """One bundle that is being served: every tail and codec of its menu, loaded once, and the worker threads.

    Raises:
        BundleError: a segment does not fit its plan.
        EngineError: a segment does not load.
        PlanError: `workers` or `max_batch` is below 1, or no greeting is as short as a message may be.
    """

    def __init__(
        self,
        bundle: Bundle,
        pace: Pace,
        limits: EdgeLimits,
        *,
        workers: int,
        threads: int,
        max_batch: int,
        batch_wait_s: float,
    ) -> None:
        self.bundle = bundle
        self.terms = Terms.of(bundle)
        self.segments = Segments(bundle.path, bundle.manifest.outputs, threads=threads)
        for plan in self.terms.plans.values():
            self.segments.parts(plan, "edge")
            self.segments.codec(plan)
        self.models = offered(bundle, self.segments)
        self.limits = Limits(
            max_message_bytes=self.terms.most_bytes(limits.max_message_bytes),
            in_flight=limits.in_flight,
            idle_s=limits.idle_s,
        )
        self.workers = Workers(
            self.segments, pace, workers=workers, max_batch=max_batch, batch_wait_s=batch_wait_s,
            max_wait_s=limits.max_wait_s, device_bytes=limits.device_bytes,
        )  # fmt: skip
        # Requests over HTTP that are being computed.
        self.guests: set[asyncio.Task[Any]] = set()

    async def answered(self) -> None:
        """Wait until no request over HTTP is being computed."""
        if self.guests:
            await asyncio.wait(self.guests)


class Edge:
    """What the app's routes share: what is served, who is connected, the counts.

    Raises:
        BundleError, EngineError, PlanError: as `Serving`; or both a pace and a load are given.
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
        door: Door | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        if pace is not None and load != 1.0:
            raise PlanError(f"give an edge a pace or a load, not both (load {load})")
        # Nobody asks an edge for what was long ago, and it is full before long.
        self.timeline = RecentTimeline(keep=_KEPT) if timeline is None else timeline
        self.requests = self.failures = self.connections = self.largest_batch = 0
        self.max_limits = EdgeLimits() if limits is None else limits
        self.door: Door = OpenDoor() if door is None else door
        self.tracer = tracer
        self.refusals = Refusals()
        self.is_ready = True
        self._pace = pace or (AsFastAsItGoes() if load == 1.0 else Loaded(load))
        self._options = {"workers": workers, "threads": threads, "max_batch": max_batch}
        self._batch_wait_s = batch_wait_s
        self.serving = self._load(bundle)
        # Of the links, those that there was room for, and of these the ones that have been welcomed.
        self._admitted: set[Conversation] = set()
        self._talks: set[Conversation] = set()
        self.metrics = EdgeMetrics(
            lambda: self.serving.workers.num_waiting, lambda: self.connections, lambda: len(asyncio.all_tasks())
        )  # fmt: skip

    def _load(self, bundle: Bundle) -> Serving:
        return Serving(bundle, self._pace, self.max_limits, batch_wait_s=self._batch_wait_s, **self._options)

    @property
    def bundle(self) -> Bundle:
        """What is served now."""
        return self.serving.bundle

    @property
    def terms(self) -> Terms:
        """What a device must agree to now."""
        return self.serving.terms

    @property
    def limits(self) -> Limits:
        """What a welcome tells the device."""
        return self.serving.limits

    def close(self) -> None:
        """End the worker threads, each behind the batch it is at."""
        self.serving.workers.close()

    async def reload(self, bundle: Bundle) -> None:
        """Serve `bundle` from now on; devices of the one before are told goodbye when their requests are answered.

        Raises:
            BundleError, EngineError: it does not load; what is served stays.
        """
        fresh = await asyncio.to_thread(self._load, bundle)
        before, self.serving = self.serving, fresh
        await self.dismiss("this edge serves another bundle now")
        await before.answered()
        await asyncio.to_thread(before.workers.close)

    async def dismiss(self, why: str, *, unknown_only: bool = False) -> None:
        """Drain every connection, or those of devices that the door no longer lets in."""
        talks = [talk for talk in self._talks if not (unknown_only and self.door.is_known(talk.device))]
        await asyncio.gather(*(talk.drain(why) for talk in talks))

    async def drain(self) -> None:
        """Take nothing more, answer what has been read, say goodbye."""
        self.is_ready = False
        await self.dismiss("this edge is going away")
        await self.serving.answered()

    async def healthz(self, request: HttpRequest) -> JSONResponse:
        """Whether this process lives; what it holds and has done is for those who may come in."""
        seen = {"status": "ok", "protocol": PROTOCOL_VERSION}
        if self.device_of(request) is None:
            return JSONResponse(seen)
        return JSONResponse(
            {
                **seen,
                "model": self.bundle.manifest.model,
                "bundle": self.bundle.digest,
                "plans": sorted(self.terms.plans),
                "connections": self.connections,
                "requests": self.requests,
                "failures": self.failures,
                "largest_batch": self.largest_batch,
                "waiting": self.serving.workers.num_waiting,
            }
        )

    async def readyz(self, request: HttpRequest) -> JSONResponse:
        """Whether it takes requests."""
        return JSONResponse({"ready": self.is_ready}, status_code=200 if self.is_ready else 503)

    async def show_metrics(self, request: HttpRequest) -> Response:
        """Counts, for those who may come in."""
        if self.device_of(request) is None:
            return self.refuse_token(request)
        return Response(self.metrics.page(), media_type=self.metrics.content_type)

    def device_of(self, request: HttpRequest | WebSocket) -> str | None:
        """The device that a request's headers name, see `Door`."""
        return self.door.device_of(request.headers.get("authorization"))

    def refuse(self, asked: HttpRequest | WebSocket, why: str, *, plan: int | None = None) -> None:
        """Log that what a peer asked is refused."""
        self.refusals.note(client_of(asked), why, device=self.device_of(asked) or None, plan=plan)

    def refuse_token(self, asked: HttpRequest | WebSocket) -> JSONResponse:
        """The answer to somebody who may not come in; counted, and with its line in the log."""
        self.metrics.refused("token")
        self.refuse(asked, "no token that this edge knows")
        return unauthorised()

    async def link(self, socket: WebSocket) -> None:
        """One device's connection, from its greeting to its end."""
        peer, device = client_of(socket), self.device_of(socket)
        if device is None:
            await socket.send_denial_response(self.refuse_token(socket))
            return
        whose = {"peer": peer, "device": device or None}
        # Of the same moment as the connection's own limit of a message.
        serving, limits = self.serving, self.max_limits
        await socket.accept()
        talk = Conversation(
            socket, EdgeConnection(serving.terms, serving.limits), serving.workers,
            partial(self._record, device or peer), device=device or peer, busy=self._refuse, idle_s=limits.idle_s,
        )  # fmt: skip
        self.connections += 1
        try:
            reason = self._no_room(talk.device)
            if reason is None:
                # Counted before it has greeted: else one device could take all connections and say nothing.
                self._admitted.add(talk)
                reason = await talk.greet(limits.hello_s)
            # What was so at the door need not be so any more.
            reason = reason or self._changed(serving, device, socket)
            if reason is None:
                await talk.welcome()
                reason = self._changed(serving, device, socket)
                if reason is None:
                    self._talks.add(talk)
                    await talk.run()
                else:
                    await talk.close(CLOSE_AWAY, reason)
            else:
                self.refuse(socket, reason)
                self.metrics.refused("greeting")
                await talk.refuse(reason)
        except ProtocolError as error:
            line = one_line(str(error))
            _LOG.warning("closed the link to %s: %s", peer, line, extra=whose)
            await talk.close(CLOSE_PROTOCOL_ERROR, line)
        except WebSocketDisconnect:
            _LOG.info("%s is gone", peer, extra=whose)
        finally:
            self._talks.discard(talk)
            self._admitted.discard(talk)
            self.connections -= 1

    def _changed(self, serving: Serving, device: str, socket: WebSocket) -> str | None:
        """Why a connection that came in before is not welcome now."""
        if serving is not self.serving or not self.is_ready:
            return "this edge is being changed: connect again"
        return None if self.device_of(socket) == device else "its token is revoked"

    def _no_room(self, device: str) -> str | None:
        """Why a new connection of a device is one too many."""
        limits = self.max_limits
        if self.connections > limits.connections:
            return f"this edge already serves {limits.connections} connections"
        if sum(talk.device == device for talk in self._admitted) >= limits.device_connections:
            return f"this edge already serves {limits.device_connections} connections of this device"
        return None

    def _refuse(self, request: Request) -> None:
        self.metrics.refused("busy")

    def _record(self, device: str, computed: Computed) -> None:
        self.note(computed, door="link", sent_bytes=len(computed.message))
        if self.tracer is not None:
            self.tracer.record([Timed.now_over(computed)], door="link", device=device)

    def note(self, computed: Computed, *, door: str, sent_bytes: int) -> None:
        """Count a request that is over."""
        self.requests += 1
        self.failures += not computed.durations_s
        self.largest_batch = max(self.largest_batch, computed.batch)
        self.timeline.add(*computed.spans())
        self.metrics.answered(computed, door=door, sent_bytes=sent_bytes)


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
    door: Door | None = None,
    tracer: Tracer | None = None,
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
        door: who is let in; everybody by default.
        tracer: where traces of requests go; none are made by default.

    Raises:
        BundleError, EngineError, PlanError: as `Edge`.
    """
    edge = Edge(
        bundle, workers=workers, threads=threads, max_batch=max_batch, batch_wait_s=batch_wait_s,
        load=load, pace=pace, limits=limits, timeline=timeline, door=door, tracer=tracer,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        edge.close()

    app = Starlette(
        routes=[
            Route("/healthz", edge.healthz),
            Route("/readyz", edge.readyz),
            Route("/metrics", edge.show_metrics),
            WebSocketRoute("/link", edge.link),
            WebSocketRoute("/", edge.link),
            *OpenInference(edge).routes(),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: answers.say, 500: answers.fail},
    )
    app.state.edge = edge
    return app
