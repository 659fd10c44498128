"""Between the wire of the Open Inference Protocol and the workers: a body's samples, and the body of their answers.

Every sample becomes a request of its own to the workers, with a payload as a device would send it, or with the values
that such a payload would hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from ..engine.sides import Values
from ..errors import PayloadError, ProtocolError
from ..protocol import Durations
from .batch import Computed
from .oip_models import VERSION, Model
from .oip_wire import BYTES, MAX_JSON_BYTES, Array, Asked, Tensor, best_classes, read_request, write_answer

JSON_LENGTH = "Inference-Header-Content-Length"


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


def json_length(request: HttpRequest, body_bytes: int) -> int | None:
    """How much of a body its header says is JSON.

    Raises:
        ProtocolError: it says no number, or more than there is.
        HTTPException: 413, more than this edge reads.
    """
    text = request.headers.get(JSON_LENGTH)
    # Thousands of digits are no length.
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ProtocolError(f'{JSON_LENGTH} must be a number of bytes, got "{text[:32]}"')
    found = None if text is None else int(text)
    if found is not None and found > body_bytes:
        raise ProtocolError(f"{JSON_LENGTH} must be up to {body_bytes} B, the body's length, got {found} B")
    if (body_bytes if found is None else found) > MAX_JSON_BYTES:
        raise HTTPException(413, f"JSON may have {MAX_JSON_BYTES} B: send tensors as binary data")
    return found


def read_samples(content: bytes, json_bytes: int | None, model: Model, max_samples: int) -> tuple[Asked, list[Sample]]:
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


def write_outputs(
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


def check(model: Model, place: int, computed: Computed) -> None:
    """Refuse where a sample has no answer: its file is at fault, or else this edge."""
    failure = computed.message.failure
    if failure is not None and model.codec is not None:
        raise HTTPException(400, f"{failure} (sample {place})")
    if failure is not None:
        raise HTTPException(500, "this edge failed; its log says why")
