"""A channel without a network: the edge's end of the protocol, called in the device's process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

from coinfer.errors import LinkError
from coinfer.protocol import (
    Busy,
    DeviceConnection,
    Durations,
    EdgeConnection,
    Failure,
    Limits,
    Ping,
    Pong,
    Reply,
    Request,
    Terms,
)
from tiny_bundle import CLASSES

Deliver = Callable[[bytes], None]
Behaviour = Callable[["MemoryChannel", Request], None]


def logits_of(payload: bytes) -> np.ndarray:
    """What this edge answers: the first five bytes of the payload's end, as floats."""
    return np.frombuffer(payload[-CLASSES:], np.uint8).astype(np.float32)[None]


def answer(channel: MemoryChannel, request: Request) -> None:
    channel.reply(request)


class MemoryChannel:
    """Joins two ends; `behaviour` decides what the edge does with each request."""

    def __init__(self, terms: Terms, behaviour: Behaviour = answer) -> None:
        self.limits = Limits(max_message_bytes=100_000, in_flight=100)
        self.behaviour = behaviour
        self.inbox: SimpleQueue[bytes | LinkError] = SimpleQueue()
        self.is_aborted = self.is_deaf = False
        self.pings: list[Ping] = []
        self.requests: list[Request] = []
        self._device, self._edge = DeviceConnection(terms), EdgeConnection(terms, self.limits)
        self._edge.receive(self._device.hello())
        self._device.receive(self._edge.welcome())
        self._lock = threading.Lock()

    # The edge's side.

    def reply(self, request: Request) -> None:
        self.inbox.put(self._edge.reply(request.request, Durations(1000, 2000, 3000), [logits_of(request.payload)]))

    def fail(self, request: Request, text: str) -> None:
        self.inbox.put(self._edge.failure(request.request, text))

    def refuse(self, request: Request, retry_after_s: float) -> None:
        self.inbox.put(self._edge.busy(request.request, retry_after_s))

    def beat(self) -> None:
        self.inbox.put(self._edge.ping(77))

    def break_down(self) -> None:
        self.inbox.put(LinkError("the link to memory broke: cut by the test"))

    # What a Channel offers.

    def frame(self, request: int, plan: int, payload: bytes) -> tuple[bytes, int]:
        message = self._device.request(request, plan, payload)
        return message, len(message)

    def forget(self, request: int) -> None:
        self._device.forget(request)

    def warm_up(self, payload: bytes) -> None:
        pass

    def rehearse(self, message: bytes) -> None:
        self._device.rehearse(message)

    def write(self, frame: bytes) -> None:
        if self.is_aborted:
            raise LinkError("the link to memory broke: aborted")
        event = self._edge.receive(frame)
        if isinstance(event, Request):
            self.requests.append(event)
            self.behaviour(self, event)

    def read(self) -> bytes:
        message = self.inbox.get()
        if isinstance(message, LinkError):
            raise message
        return message

    def parse(self, message: bytes) -> Reply | Failure | Busy | Pong | None:
        event = self._device.receive(message)
        if isinstance(event, Ping):
            assert self._edge.receive(self._device.pong(event.token)) == Pong(event.token)
            return None
        assert isinstance(event, Reply | Failure | Busy | Pong)
        return event

    def ping(self, token: int, *, padding: int = 0) -> None:
        event = self._edge.receive(self._device.ping(token, padding=padding))
        assert isinstance(event, Ping)
        self.pings.append(event)
        if not self.is_deaf:
            self.inbox.put(self._edge.pong(event.token))

    def is_open(self) -> bool:
        return not self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True
        self.inbox.put(LinkError("the link to memory broke: aborted"))

    def close(self) -> None:
        self.is_aborted = True
