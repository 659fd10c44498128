"""The arithmetic of a shaped link, on virtual time: exact."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from coinfer.errors import PlanError
from coinfer.lab.fluid import ConstantRate, Direction, Frames, Piece, TraceRate, stream_wire_bytes
from coinfer.profile import Trace
from coinfer.protocol import message_wire_bytes, wire_bytes

SQUARE = Trace(name="square", start_s=(0.0, 1.0, 2.0), rate_bps=(8.0, 0.0, 16.0), duration_s=3.0)


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=12))
def test_a_message_costs_the_same_however_it_is_cut_up(sizes: list[int]) -> None:
    whole = sum(sizes)
    before, wire = 0, 0
    for size in sizes:
        wire += stream_wire_bytes(before, size)
        before += size
    assert wire == whole + 40 * math.ceil(whole / 1448)


@pytest.mark.parametrize("body", [0, 1, 117, 118, 1000, 1430, 1500, 20_000, 70_000])
def test_a_websocket_message_takes_exactly_what_the_protocol_predicts(body: int) -> None:
    message = bytes(8 + body)
    frame = Frame(Opcode.BINARY, message).serialize(mask=True)
    uplink = Direction(ConstantRate(1e6), delay_s=0.25)
    delivery_s = 0.0
    for piece in _after_upgrade().cut(frame):
        delivery_s = uplink.send(2.0, len(piece.data), message_before=piece.before)
    wire = float(wire_bytes(body, masked=True))
    assert uplink.wire_bytes == wire == message_wire_bytes(len(message), masked=True)
    assert delivery_s == pytest.approx(2.0 + wire * 8 / 1e6 + 0.25, abs=1e-12)


def test_messages_queue_behind_each_other_and_delay_occupies_nothing() -> None:
    link = Direction(ConstantRate(8 * 140.0), delay_s=10.0)
    assert [link.send(t, 100) for t in (0.0, 0.0, 1.5, 5.0)] == [11.0, 12.0, 13.0, 16.0]
    assert (link.num_bytes, link.wire_bytes) == (400, 560)


def test_an_infinite_rate_takes_no_time() -> None:
    assert Direction(ConstantRate(math.inf)).send(3.0, 10**6) == 3.0


def test_a_shorter_delay_does_not_let_a_later_piece_overtake() -> None:
    link = Direction(ConstantRate(math.inf), delay_s=1.0)
    link.send(0.0, 10)
    link.change(ConstantRate(math.inf), delay_s=0.0)
    assert link.send(0.5, 10) == 1.0


def test_a_stalled_direction_carries_nothing_before_its_end() -> None:
    link = Direction(ConstantRate(8 * 140.0))
    link.stall(4.0)
    assert [link.send(0.0, 100), link.send(0.0, 100)] == [5.0, 6.0]


def test_room_comes_when_enough_has_departed() -> None:
    link = Direction(ConstantRate(8 * 140.0))
    for _ in range(4):
        link.send(0.0, 100)
    assert link.room_s(0.0, 400) == 0.0
    assert link.room_s(0.0, 399) == 1.0
    assert link.room_s(0.0, 150) == 3.0
    assert link.room_s(2.5, 150) == 3.0
    assert link.room_s(3.0, 150) == 3.0
    assert link.room_s(9.0, 0) == 9.0


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_is_above_zero(rate: float) -> None:
    with pytest.raises(PlanError, match=str(rate)):
        ConstantRate(rate)


@pytest.mark.parametrize(
    ("start_s", "bits", "finish_s"),
    [(0.0, 4.0, 0.5), (0.0, 8.0, 1.0), (0.5, 12.0, 2.5), (1.5, 16.0, 3.0), (0.0, 24.0, 3.0), (2.0, 24.0, 4.0)]
    + [(0.0, 240.0, 30.0), (31.0, 0.0, 31.0), (31.25, 1.0, 32.0625), (3.0, 0.5, 3.0625)],
)
def test_a_trace_is_integrated_over_time(start_s: float, bits: float, finish_s: float) -> None:
    assert TraceRate(SQUARE).finish_s(start_s, bits) == finish_s
    assert TraceRate(SQUARE, origin_s=100.0).finish_s(100.0 + start_s, bits) == 100.0 + finish_s


@given(st.integers(0, 2**32 - 1), st.floats(0, 50), st.floats(0, 5000))
@settings(max_examples=60)
def test_a_trace_carries_what_a_sum_over_small_steps_says(seed: int, start_s: float, bits: float) -> None:
    chance = np.random.default_rng(seed)
    starts = np.concatenate([[0.0], np.sort(chance.choice(np.arange(1, 20), 4, replace=False))])
    rates = chance.choice([0.0, 10.0, 300.0], 5)
    rates[2] = 50.0
    trace = Trace(name="t", start_s=tuple(starts.tolist()), rate_bps=tuple(rates.tolist()), duration_s=20.0)
    finish_s = TraceRate(trace).finish_s(start_s, bits)
    borders = {start_s, finish_s}
    borders |= {
        k * 20.0 + s for k in range(int(finish_s // 20) + 1) for s in starts if start_s < k * 20.0 + s < finish_s
    }
    times = sorted(borders)
    carried = sum(trace.at((a + b) / 2) * (b - a) for a, b in zip(times, times[1:], strict=False))
    assert carried == pytest.approx(bits, abs=1e-6 * (1 + bits))


def _after_upgrade() -> Frames:
    frames = Frames()
    frames.cut(b"GET /link HTTP/1.1\r\nHost: a\r\n\r\n")
    return frames


@given(
    st.lists(st.integers(0, 300) | st.sampled_from([125, 126, 65535, 65536]), min_size=1, max_size=6),
    st.lists(st.integers(1, 700), min_size=1, max_size=30),
    st.booleans(),
)
@settings(max_examples=60)
def test_frames_are_found_in_any_cutting_of_the_stream(sizes: list[int], cuts: list[int], mask: bool) -> None:
    upgrade = b"GET / HTTP/1.1\r\n\r\n" if mask else b"HTTP/1.1 101 Switching\r\nA: b\r\n\r\n"
    messages = [upgrade, *(Frame(Opcode.BINARY, bytes(size)).serialize(mask=mask) for size in sizes)]
    stream = b"".join(messages)
    frames, pieces, position = Frames(), [], 0
    # The first piece of a stream is long enough to tell what it is.
    for size in [20, *cuts, len(stream)]:
        pieces += frames.cut(stream[position : position + size])
        position += size
    assert b"".join(piece.data for piece in pieces) == stream
    found: list[int] = []
    for piece in pieces:
        assert piece.data
        if piece.before == 0:
            found.append(0)
        assert piece.before == found[-1]
        found[-1] += len(piece.data)
    assert found == [len(message) for message in messages]


def test_a_stream_without_borders_is_taken_piece_by_piece() -> None:
    frames = Frames()
    assert frames.cut(b"\x00" * 50) + frames.cut(b"") + frames.cut(b"abc") == [Piece(b"\x00" * 50, 0), Piece(b"abc", 0)]
