"""A link on which nothing is asked is as good as any other: silence alone is no loss."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from coinfer.bundle import Bundle
from coinfer.protocol import Pong, Terms
from coinfer.runtime.app import make_app
from coinfer.runtime.channel import Channel
from coinfer.runtime.guarded import GuardedDevice
from coinfer.runtime.keeper import KeepTerms
from http_edge import served
from tiny_bundle import DEVICE, UPLOAD, pictures

PATIENCE_S = 30


@pytest.fixture(scope="module")
def url(tiny_bundle: Bundle) -> Iterator[str]:
    with served(make_app(tiny_bundle)) as where:
        yield f"ws://{where}"


def test_whoever_is_watched_over_waits_through_a_silence(url: str, tiny_bundle: Bundle) -> None:
    channel = Channel(url, Terms.of(tiny_bundle), timeout_s=0.2, is_watched=True)
    heard: list[object] = []
    reader = threading.Thread(target=lambda: heard.append(channel.parse(channel.read())))
    reader.start()
    time.sleep(0.5)
    assert reader.is_alive()
    channel.ping(5)
    reader.join(PATIENCE_S)
    channel.close()
    assert heard == [Pong(5)]


@pytest.mark.parametrize("plan", [DEVICE, UPLOAD])
def test_an_idle_link_outlives_the_bound_of_notice(url: str, tiny_bundle: Bundle, plan: int) -> None:
    keep = KeepTerms(notice_s=0.5, heartbeat_s=30.0)
    with GuardedDevice(tiny_bundle, edge=url, plan=plan, keep=keep) as device:
        before = device.infer(pictures(1)[0])
        time.sleep(1.2)
        after = device.infer(pictures(1)[0])
        # With the default bounds, heartbeats are further apart than a loss may go unnoticed.
        assert device.keeper.num_lost == 0 and device.keeper.num_connected == 1
        assert before.answered == after.answered == ("edge" if plan == UPLOAD else "device")
