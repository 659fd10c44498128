"""Lines about refusals: one each, and no more of them a second than are allowed; and whom log lines name."""

from __future__ import annotations

import asyncio
import logging

import pytest
from test_conversation import Talk

from coinfer.bundle import Bundle
from coinfer.runtime.batch import Computed
from coinfer.runtime.refusals import Refusals
from tiny_bundle import UPLOAD


def test_a_second_has_so_many_lines_and_one_more_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 100.0
    refusals = Refusals(lines_per_s=3, clock=lambda: now_s)

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    for number in range(5):
        now_s += 0.1
        refusals.note(f"peer:{number}", "why\nnot", device="camera" if number else None)
    assert [record.peer for record in caplog.records] == ["peer:0", "peer:1", "peer:2"]  # type: ignore[attr-defined]
    assert [record.device for record in caplog.records] == [None, "camera", "camera"]  # type: ignore[attr-defined]
    assert lines() == [f"refused peer:{number}: why not" for number in range(3)]
    refusals.sum_up()
    assert lines() == []
    # Its second is over: that is said once, by whichever comes first.
    now_s += 1.0
    refusals.sum_up()
    refusals.sum_up()
    assert lines() == ["refused 2 more: a second has 3 lines of them"]
    for number in range(4):
        refusals.note(f"peer:{number}", "no")
    assert len(lines()) == 3
    now_s += 1.0
    refusals.note("peer:9", "no")
    assert lines() == ["refused 1 more: a second has 3 lines of them", "refused peer:9: no"]


def test_a_reply_that_nobody_takes_is_named_in_the_log(tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    async def told() -> None:
        talk = Talk(tiny_bundle)
        talk.conversation.device = "127.0.0.1:5"
        talk.ask(7)
        await talk.settle()
        talk.socket.is_gone = True
        talk.pool.work()
        await talk.settle()
        assert [type(computed) for computed in talk.sent] == [Computed]
        talk.running.cancel()
        await asyncio.gather(talk.running, return_exceptions=True)

    with caplog.at_level(logging.INFO, logger="coinfer.edge"):
        asyncio.run(told())
    record = next(record for record in caplog.records if "its device is gone" in record.getMessage())
    found = {name: getattr(record, name, None) for name in ("peer", "device", "request", "plan")}
    assert found == {"peer": "127.0.0.1:5", "device": None, "request": 7, "plan": UPLOAD}
