"""One device's connection at the edge, on a scripted socket and workers that wait to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from coinfer.bundle import Bundle
from coinfer.engine.segments import Segments
from coinfer.errors import ProtocolError
from coinfer.protocol import DeviceConnection, EdgeConnection, Failure, Limits, Pong, Reply, Request, Terms
from coinfer.runtime.batch import Computed, Job, Workers
from coinfer.runtime.conversation import Conversation
from coinfer.runtime.pace import AsFastAsItGoes
from tiny_bundle import UPLOAD, pictures


class HeldWorkers(Workers):
    """Computes nothing until `work` is called."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(Segments(bundle.path, bundle.manifest.outputs), AsFastAsItGoes())
        # Its threads are not needed.
        self.close()
        self.held: list[Any] = []

    def submit(self, connection: EdgeConnection, request: Request, arrived_s: float, **more: Any) -> Future[Computed]:
        self.held.append(Job(connection, request, arrived_s, Future()))
        return self.held[-1].future

    def work(self, index: int = 0) -> None:
        job = self.held.pop(index)
        job.future.set_running_or_notify_cancel()
        try:
            job.future.set_result(self.compute([job])[0])
        except ZeroDivisionError as error:
            job.future.set_exception(error)


class ScriptedSocket:
    """What the edge's app sees of a WebSocket."""

    def __init__(self) -> None:
        self.to_edge: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.from_edge: list[bytes | str] = []
        self.reads = 0
        self.is_gone = False

    def put(self, message: bytes | str) -> None:
        self.to_edge.put_nowait(
            {"type": "websocket.receive", "bytes" if isinstance(message, bytes) else "text": message}
        )

    def leave(self) -> None:
        self.is_gone = True
        self.to_edge.put_nowait({"type": "websocket.disconnect", "code": 1001})

    async def receive(self) -> dict[str, Any]:
        message = await self.to_edge.get()
        self.reads += 1
        return message

    async def send_bytes(self, message: bytes) -> None:
        if self.is_gone:
            raise WebSocketDisconnect(1006)
        self.from_edge.append(message)

    send_text = send_bytes


class Talk:
    """A conversation behind its greeting, with up to two requests in flight."""

    def __init__(self, bundle: Bundle) -> None:
        terms = Terms.of(bundle)
        self.payload = Segments(bundle.path, bundle.manifest.outputs).codec(bundle.plan(UPLOAD)).encode((pictures(1),))
        self.device = DeviceConnection(terms)
        self.socket, self.pool = ScriptedSocket(), HeldWorkers(bundle)
        self.sent: list[Computed] = []
        edge = EdgeConnection(terms, Limits(max_message_bytes=10_000, in_flight=2))
        edge.receive(self.device.hello())
        self.device.receive(edge.welcome())
        self.conversation = Conversation(self.socket, edge, self.pool, self.sent.append)  # type: ignore[arg-type]
        self.running = asyncio.ensure_future(self.conversation.run())

    def ask(self, number: int, payload: bytes | None = None) -> None:
        self.socket.put(self.device.request(number, UPLOAD, self.payload if payload is None else payload))

    async def settle(self) -> None:
        """Let the event loop do all that it can."""
        for _ in range(30):
            await asyncio.sleep(0)


def run(bundle: Bundle, story: Callable[[Talk], Any]) -> None:
    async def told() -> None:
        await story(Talk(bundle))

    asyncio.run(told())


def test_replies_leave_as_they_are_done(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        talk.ask(0)
        talk.ask(1)
        await talk.settle()
        talk.pool.work(1)
        await talk.settle()
        talk.pool.work(0)
        await talk.settle()
        replies = [talk.device.receive(message) for message in talk.socket.from_edge]
        assert all(isinstance(reply, Reply) for reply in replies)
        assert [reply.request for reply in replies] == [1, 0]  # type: ignore[union-attr]
        assert [computed.request.request for computed in talk.sent] == [1, 0]
        stages = [(span.stage, span.clock) for span in talk.sent[0].spans()]
        assert stages == [("wait", "edge"), ("decode", "edge"), ("tail", "edge")]
        talk.socket.leave()
        with pytest.raises(WebSocketDisconnect):
            await talk.running

    run(tiny_bundle, story)


def test_with_too_many_in_flight_nothing_more_is_read(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        for number in range(5):
            talk.ask(number)
        await talk.settle()
        assert talk.socket.reads == len(talk.pool.held) == 2
        talk.pool.work()
        await talk.settle()
        assert talk.socket.reads == 3 and len(talk.pool.held) == 2 and len(talk.socket.from_edge) == 1
        talk.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await talk.running

    run(tiny_bundle, story)


def test_a_payload_that_cannot_be_decoded_fails_alone(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        talk.ask(0, talk.payload[:-1])
        talk.ask(1)
        await talk.settle()
        talk.pool.work()
        talk.pool.work()
        await talk.settle()
        failure, reply = (talk.device.receive(message) for message in talk.socket.from_edge)
        assert isinstance(failure, Failure) and failure.request == 0 and failure.text
        assert isinstance(reply, Reply) and reply.request == 1
        assert talk.sent[0].spans() == []
        talk.socket.put(talk.device.ping(5))
        await talk.settle()
        assert talk.device.receive(talk.socket.from_edge[-1]) == Pong(5)
        talk.socket.leave()
        with pytest.raises(WebSocketDisconnect):
            await talk.running

    run(tiny_bundle, story)


def test_when_the_device_goes_its_waiting_requests_are_forgotten(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        talk.ask(0)
        await talk.settle()
        talk.socket.leave()
        with pytest.raises(WebSocketDisconnect):
            await talk.running
        (held,) = talk.pool.held
        assert held.future.cancelled() and talk.socket.from_edge == []

    run(tiny_bundle, story)


def test_a_violation_ends_the_conversation(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        talk.ask(0)
        talk.socket.put(b"\x09\0\0\0\0\0\0\0")
        with pytest.raises(ProtocolError, match="unknown message type 9"):
            await talk.running
        (held,) = talk.pool.held
        assert held.future.cancelled()

    run(tiny_bundle, story)


def test_a_defect_of_the_edge_is_never_swallowed(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        talk.ask(0)
        await talk.settle()
        talk.pool.compute = lambda jobs: 1 // 0  # type: ignore[method-assign]
        talk.pool.work()
        with pytest.raises(BaseExceptionGroup) as caught:
            await talk.running
        assert caught.group_contains(ZeroDivisionError)

    run(tiny_bundle, story)


def test_a_device_that_goes_without_its_reply_is_no_error(tiny_bundle: Bundle) -> None:
    async def story(talk: Talk) -> None:
        talk.ask(0)
        await talk.settle()
        talk.socket.is_gone = True
        talk.pool.work()
        await talk.settle()
        assert not talk.running.done() and talk.socket.from_edge == []
        talk.socket.leave()
        with pytest.raises(WebSocketDisconnect):
            await talk.running

    run(tiny_bundle, story)
