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
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import msgspec
import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..engine.sides import Values
from ..errors import BusyError, PayloadError, ProtocolError
from ..protocol import Durations, Request
from ..protocol.messages import one_line
from . import openapi
from .answers import error, unauthorised
from .batch import Computed
from .body import Body
from .oip_models import VERSION, Model
from .oip_wire import BYTES, MAX_JSON_BYTES, Array, Asked, Tensor, best_classes, parse_json, read_request, write_answer
from .traces import Timed

if TYPE_CHECKING:
    from .app import Edge, Serving

_LOG = logging.getLogger("coinfer.edge")
_JSON_LENGTH = "Inference-Header-Content-Length"
_INDEX_BYTES = 65536
# What is read or written in less time than a thread takes to begin.
_AT_ONCE_BYTES = 65536
_RETRY_S = 1.0

T = TypeVar("T")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]
Asking = Callable[[HttpRequest, Body], Awaitable[Response]]


class Answer(NamedTuple):
    """What an asker of this door is given: the outputs, or why there are none."""

    outputs: Sequence[Array] = ()
    failure: str | None = None


class HttpAsker:
    """Takes the workers' answers as they are, see `turns.Asker`."""

    def reply(self, request: int, durations: Durations, outputs: Sequence[Array], *, exit: int | None = None) -> Answer:
        """The outputs, each (1, *shape)."""
        return Answer(outputs)

    def failure(self, request: int, text: str) -> Answer:
        """Why there are none."""
        return Answer(failure=text)


class Sample(NamedTuple):
    """One sample of a request: the payload of its plan, or what such a payload would hold."""

    payload: bytes
    values: Values | None


class _Index(msgspec.Struct):
    ready: bool = False


class OpenInference:
    """The routes of one edge."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._asker = HttpAsker()
        self._numbers = count()
        self._num_open = 0
        # Bytes of bodies that are held, by whom they came from.
        self._held: dict[str, int] = {}

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
        json_bytes = _json_bytes(request, len(content))
        # It may have changed while the body came.
        self._check_ready()
        model, serving = self._model(request), self._edge.serving
        task = asyncio.current_task()
        assert task is not None
        serving.guests.add(task)
        over: list[Timed] = []
        num_sent = 0
        try:
            asked, samples = await _aside(len(content), _read, content, json_bytes, model, self._max_samples(model))
            done = await self._compute(request, serving, model, samples, over)
            labels = serving.bundle.manifest.classes
            size = sum(array.nbytes for computed in done for array in computed.message.outputs)
            answer, length = await _aside(size, _write, model, asked, done, labels)
            num_sent = len(answer)
        finally:
            serving.guests.discard(task)
            for timed in over:
                self._edge.note(timed.computed, door="http", sent_bytes=num_sent // len(over))
            if over and self._edge.tracer is not None:
                self._edge.tracer.record(over, door="http", device=self._asker_of(request), headers=request.headers)
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={_JSON_LENGTH: str(length)})

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
                    _check(model, place, found[place])
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
                return self._refused_token()
            return await endpoint(request)

        return answer

    def _sent(self, endpoint: Asking, most: int) -> Endpoint:
        """An endpoint for those who may come in and bring a body of up to `most` bytes."""

        async def answer(request: HttpRequest) -> Response:
            device = self._asker_of(request)
            held = 0

            def hold(num_bytes: int) -> None:
                nonlocal held
                if self._held.get(device, 0) + num_bytes > self._edge.max_limits.device_bytes:
                    raise BusyError("too many bytes of this device are here", retry_after_s=_RETRY_S)
                held += num_bytes
                self._held[device] = self._held.get(device, 0) + num_bytes

            body = Body(request, most, self._edge.max_limits.hello_s, hold)
            self._num_open += 1
            try:
                said = await self._said(endpoint, request, body)
                if not body.is_over and not await body.drop():
                    said.headers["Connection"] = "close"
                return said
            finally:
                self._num_open -= 1
                if held:
                    self._held[device] -= held
                    if not self._held[device]:
                        del self._held[device]

        return answer

    async def _said(self, endpoint: Asking, request: HttpRequest, body: Body) -> Response:
        """The endpoint's answer, or why there is none."""
        if self._edge.device_of(request) is None:
            return self._refused_token()
        try:
            if self._num_open > self._edge.max_limits.connections:
                raise BusyError("too many requests are open", retry_after_s=_RETRY_S)
            return await endpoint(request, body)
        except HTTPException as problem:
            return error(problem.status_code, problem.detail, headers=problem.headers)
        except (ProtocolError, PayloadError) as problem:
            return error(400, str(problem))
        except BusyError as problem:
            self._edge.metrics.refused("busy")
            seconds = max(1, math.ceil(problem.retry_after_s))
            return error(503, str(problem), headers={"Retry-After": str(seconds)})
        except ClientDisconnect:
            _LOG.info("a client is gone, its request with it: %s", one_line(request.url.path))
            return error(400, "nobody is there to be told")

    def _refused_token(self) -> JSONResponse:
        self._edge.metrics.refused("token")
        return unauthorised()

    def _asker_of(self, request: HttpRequest) -> str:
        """In whose line its samples wait: the device's, or the connection's where nobody has a name."""
        peer = f"{request.client.host}:{request.client.port}" if request.client is not None else "a client"
        return self._edge.device_of(request) or peer

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


def _json_bytes(request: HttpRequest, body_bytes: int) -> int | None:
    """How much of a body its header says is JSON.

    Raises:
        ProtocolError: it says no number, or more than there is.
        HTTPException: 413, more than this edge reads.
    """
    text = request.headers.get(_JSON_LENGTH)
    # Thousands of digits are no length.
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ProtocolError(f'{_JSON_LENGTH} must be a number of bytes, got "{text[:32]}"')
    found = None if text is None else int(text)
    if found is not None and found > body_bytes:
        raise ProtocolError(f"{_JSON_LENGTH} must be up to {body_bytes} B, the body's length, got {found} B")
    if (body_bytes if found is None else found) > MAX_JSON_BYTES:
        raise HTTPException(413, f"JSON may have {MAX_JSON_BYTES} B: send tensors as binary data")
    return found


async def _aside(num_bytes: int, call: Callable[..., T], *given: Any) -> T:
    """The call's result, from a thread where it is about much."""
    return await asyncio.to_thread(call, *given) if num_bytes > _AT_ONCE_BYTES else call(*given)


def _read(content: bytes, json_bytes: int | None, model: Model, max_samples: int) -> tuple[Asked, list[Sample]]:
    """What is asked, and the samples as the model's plan takes them."""
    asked = read_request(content, json_bytes, model.input, model.outputs, max_samples=max_samples)
    if model.codec is None:
        return asked, [Sample(b"", (sample,)) for sample in asked.samples if isinstance(sample, np.ndarray)]
    samples = []
    for place, file in enumerate(asked.samples):
        assert isinstance(file, bytes)
        try:
            samples.append(Sample(model.codec.wrap(file), None))
        except PayloadError as problem:
            raise ProtocolError(f"{problem} (sample {place})") from problem
    return asked, samples


def _write(
    model: Model, asked: Asked, done: Sequence[Computed], labels: Sequence[str]
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON."""
    tensors = []
    for wanted in asked.wanted:
        port = model.outputs[wanted.output]
        values = np.concatenate([computed.message.outputs[wanted.output] for computed in done])
        if wanted.classes:
            fitting = labels if len(labels) == math.prod(port.shape) else ()
            best = best_classes(values, wanted.classes, fitting)
            tensors.append(Tensor(port.name, BYTES, (len(values), wanted.classes), best, wanted.is_binary))
        else:
            tensors.append(Tensor(port.name, port.datatype, values.shape, values, wanted.is_binary))
    return write_answer(model.name, VERSION, asked.id, tensors)


def _check(model: Model, place: int, computed: Computed) -> None:
    """Refuse where a sample has no answer: its file is at fault, or else this edge."""
    failure = computed.message.failure
    if failure is not None and model.codec is not None:
        raise HTTPException(400, f"{failure} (sample {place})")
    if failure is not None:
        raise HTTPException(500, "this edge failed; its log says why")
