"""The edge's door for other people's clients: the Open Inference Protocol (KServe v2) over HTTP, on the app's port.

    GET   /v2                                              what this server is
    GET   /v2/health/live, /v2/health/ready                whether it lives; whether it takes requests
    GET   /v2/models/MODEL[/versions/1][/ready, /config]   a model's inputs and outputs; whether it is ready
    POST  /v2/models/MODEL[/versions/1]/infer              inference
    POST  /v2/repository/index                             the models
    GET   /v2/openapi.json                                 all routes of this app, for machines

Each sample of a request becomes a job of its own, in the line of whoever asks, so that these requests and those of
links share batches, turns and refusals.  `oip_wire` reads and writes what goes over the wire, `oip_models` says what
is offered, `body` holds the caps of a body.  A client that goes away takes its requests along.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..errors import BusyError, PayloadError, ProtocolError
from ..protocol import Request
from ..protocol.messages import one_line
from . import openapi
from .answers import client_of, error
from .batch import Computed
from .body import Body, Held
from .oip_models import VERSION, Model
from .oip_samples import JSON_LENGTH, HttpAsker, Sample, check, json_length, read_samples, write_outputs
from .oip_wire import parse_json
from .traces import Timed

if TYPE_CHECKING:
    from .app import Edge, Serving

_LOG = logging.getLogger("coinfer.edge")
_INDEX_BYTES = 65536
# What is read or written in less time than a thread takes to begin.
_AT_ONCE_BYTES = 65536
_RETRY_S = 1.0

T = TypeVar("T")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]
Asking = Callable[[HttpRequest, Body], Awaitable[Response]]


class _Index(msgspec.Struct):
    ready: bool = False


class OpenInference:
    """The routes of one edge."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._asker = HttpAsker()
        self._numbers = count()
        self._num_open = 0
        self._held = Held(edge.max_limits.device_bytes)

    def routes(self) -> list[Route]:
        """All of them."""
        of_model: dict[str, Endpoint] = {"": self.metadata, "/ready": self.model_ready, "/config": self.config}
        routes = [
            Route("/v2", self._asked(self.server)),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2/openapi.json", self._asked(self.document)),
            Route("/v2/repository/index", self._sent(self.index, _INDEX_BYTES), methods=["POST"]),
        ]
        for start in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [Route(start + end, self._asked(endpoint)) for end, endpoint in of_model.items()]
            most = min(self._edge.max_limits.body_bytes, self._edge.max_limits.device_bytes)
            routes.append(Route(f"{start}/infer", self._sent(self.infer, most), methods=["POST"]))
        return routes

    async def live(self, request: HttpRequest) -> JSONResponse:
        """Whether this process lives."""
        return JSONResponse({"live": True})

    async def ready(self, request: HttpRequest) -> JSONResponse:
        """Whether it takes requests."""
        is_ready = self._edge.is_ready
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    async def server(self, request: HttpRequest) -> JSONResponse:
        """What this is."""
        return JSONResponse(
            {"name": "coinfer", "version": __version__, "extensions": ["binary_tensor_data", "classification"]}
        )

    async def document(self, request: HttpRequest) -> JSONResponse:
        """The OpenAPI document of the app."""
        return JSONResponse(openapi.document(self._edge.serving.models))

    async def metadata(self, request: HttpRequest) -> JSONResponse:
        """A model's inputs and outputs."""
        return JSONResponse(self._model(request).metadata())

    async def config(self, request: HttpRequest) -> JSONResponse:
        """A model's configuration, as Triton's clients ask for it."""
        model = self._model(request)
        return JSONResponse(model.config(self._max_samples(model)))

    async def model_ready(self, request: HttpRequest) -> JSONResponse:
        """Whether a model takes requests."""
        name, is_ready = self._model(request).name, self._edge.is_ready
        return JSONResponse({"name": name, "ready": is_ready}, status_code=200 if is_ready else 503)

    async def index(self, request: HttpRequest, body: Body) -> JSONResponse:
        """The models."""
        content = await body.read()
        if content:
            parse_json(content, _Index)
        names = self._edge.serving.models
        return JSONResponse([{"name": name, "version": VERSION, "state": "READY", "reason": ""} for name in names])

    async def infer(self, request: HttpRequest, body: Body) -> Response:
        """Inference: the outputs of the samples, in their order."""
        self._model(request)
        self._check_ready()
        content = await body.read()
        json_bytes = json_length(request, len(content))
        # It may have changed while the body came.
        self._check_ready()
        model, serving = self._model(request), self._edge.serving
        task = asyncio.current_task()
        assert task is not None
        serving.guests.add(task)
        over: list[Timed] = []
        num_sent = 0
        try:
            most = self._max_samples(model)
            asked, samples = await _aside(len(content), read_samples, content, json_bytes, model, most)
            done = await self._compute(request, serving, model, samples, over)
            labels = serving.bundle.manifest.classes
            size = sum(array.nbytes for computed in done for array in computed.message.outputs)
            answer, length = await _aside(size, write_outputs, model, asked, done, labels)
            num_sent = len(answer)
        finally:
            serving.guests.discard(task)
            for timed in over:
                self._edge.note(timed.computed, door="http", sent_bytes=num_sent // len(over))
            if over and self._edge.tracer is not None:
                self._edge.tracer.record(over, door="http", device=self._asker_of(request), headers=request.headers)
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={JSON_LENGTH: str(length)})

    async def _compute(
        self, request: HttpRequest, serving: Serving, model: Model, samples: Sequence[Sample], over: list[Timed]
    ) -> list[Computed]:
        """What the workers make of the samples, not too many of them at once; each goes to `over` as it is done.

        Raises:
            BusyError: there is no time for them.
            ClientDisconnect: nobody waits for them any more.
            HTTPException: one of them failed.
        """
        found: dict[int, Computed] = {}
        running: dict[asyncio.Future[Computed], tuple[int, int]] = {}
        left = deque(enumerate(samples))
        gone = asyncio.ensure_future(request.receive())
        try:
            while left or running:
                while left and len(running) < self._edge.max_limits.in_flight:
                    try:
                        future = self._submit(request, serving, model, left[0][1])
                    except BusyError:
                        # When some of its own are done, there may be room.
                        if not running:
                            raise
                        break
                    running[future] = (left.popleft()[0], time.time_ns())
                await asyncio.wait({*running, cast(asyncio.Future[Any], gone)}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientDisconnect
                for future in [future for future in running if future.done()]:
                    place, arrived_ns = running.pop(future)
                    if future.cancelled():
                        raise BusyError("this edge is being changed", retry_after_s=_RETRY_S)
                    found[place] = future.result()
                    over.append(Timed(found[place], arrived_ns))
                    check(model, place, found[place])
        finally:
            gone.cancel()
            for future in running:
                future.cancel()
        return [found[place] for place in range(len(samples))]

    def _submit(
        self, request: HttpRequest, serving: Serving, model: Model, sample: Sample
    ) -> asyncio.Future[Computed]:
        job = Request(next(self._numbers) % 2**32, model.plan, sample.payload)
        return asyncio.wrap_future(
            serving.workers.submit(
                self._asker, job, time.perf_counter(), device=self._asker_of(request), values=sample.values
            )
        )

    def _asked(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint for those who may come in."""

        async def answer(request: HttpRequest) -> Response:
            if self._edge.device_of(request) is None:
                return self._edge.refuse_token(request)
            return await endpoint(request)

        return answer

    def _sent(self, endpoint: Asking, most: int) -> Endpoint:
        """An endpoint for those who may come in and bring a body of up to `most` bytes."""

        async def answer(request: HttpRequest) -> Response:
            device = self._asker_of(request)
            body = Body(request, most, self._edge.max_limits.hello_s, partial(self._held.take, device))
            self._num_open += 1
            try:
                said = await self._said(endpoint, request, body)
                if not body.is_over and not await body.drop():
                    said.headers["Connection"] = "close"
                return said
            finally:
                self._num_open -= 1
                self._held.give(device, body.num_held)

        return answer

    async def _said(self, endpoint: Asking, request: HttpRequest, body: Body) -> Response:
        """The endpoint's answer, or why there is none."""
        if self._edge.device_of(request) is None:
            return self._edge.refuse_token(request)
        try:
            if self._num_open > self._edge.max_limits.connections:
                raise BusyError("too many requests are open", retry_after_s=_RETRY_S)
            return await endpoint(request, body)
        except HTTPException as problem:
            return self._refused(request, problem.status_code, problem.detail, problem.headers)
        except (ProtocolError, PayloadError) as problem:
            return self._refused(request, 400, str(problem))
        except BusyError as problem:
            self._edge.metrics.refused("busy")
            seconds = max(1, math.ceil(problem.retry_after_s))
            return error(503, str(problem), headers={"Retry-After": str(seconds)})
        except ClientDisconnect:
            known = {"peer": client_of(request), "device": self._edge.device_of(request) or None}
            path = one_line(request.url.path)
            _LOG.info(
                "a client is gone, its request with it: %s", path, extra={**known, "plan": self._plan_of(request)}
            )
            return error(400, "nobody is there to be told")

    def _refused(
        self, request: HttpRequest, status: int, line: str, headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        if status < 500:
            self._edge.refuse(request, line, plan=self._plan_of(request))
        return error(status, line, headers=headers)

    def _plan_of(self, request: HttpRequest) -> int | None:
        """The number of the plan that a path names, where it names one."""
        model = self._edge.serving.models.get(request.path_params.get("model", ""))
        return None if model is None else model.plan.number

    def _asker_of(self, request: HttpRequest) -> str:
        """In whose line its samples wait: the device's, or the connection's where nobody has a name."""
        return self._edge.device_of(request) or client_of(request)

    def _check_ready(self) -> None:
        if not self._edge.is_ready:
            raise BusyError("this edge is going away", retry_after_s=_RETRY_S)

    def _model(self, request: HttpRequest) -> Model:
        """The model that a path names.

        Raises:
            HTTPException: 404, no model has that name, or that version.
        """
        models, name = self._edge.serving.models, request.path_params["model"]
        version = request.path_params.get("version", VERSION)
        if name not in models:
            raise HTTPException(404, f'models are {", ".join(models)}, got "{name[:64]}"')
        if version != VERSION:
            raise HTTPException(404, f'model "{name}" has version {VERSION}, got "{version[:64]}"')
        return models[name]

    def _max_samples(self, model: Model) -> int:
        """Of one request: no more than that input and outputs keep within the cap of a body."""
        limits = self._edge.max_limits
        largest = max(1, model.input.num_bytes, sum(port.num_bytes for port in model.outputs))
        return max(1, min(limits.samples, limits.body_bytes // largest))


async def _aside(num_bytes: int, call: Callable[..., T], *given: Any) -> T:
    """The call's result, from a thread where it is about much."""
    return await asyncio.to_thread(call, *given) if num_bytes > _AT_ONCE_BYTES else call(*given)
