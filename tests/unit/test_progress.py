"""Progress where there is no terminal: a line a stage, and for long ones how long they may still take."""

import pytest

from coinfer.cli import output


def test_a_long_stage_says_now_and_then_how_long_it_may_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moment_s = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: moment_s[0])
    with output.progress_on_stderr() as report:
        for step in range(101):
            report("unit: alone", step, 100, "loss 0.5, 12 B")
            moment_s[0] += 1.0
        report("report", 0, 1, "")
    assert capsys.readouterr().err.splitlines() == [
        "unit: alone (100)",
        "unit: alone 31/100, 69 s left, loss 0.5, 12 B",
        "unit: alone 62/100, 38 s left, loss 0.5, 12 B",
        "unit: alone 93/100, 7 s left, loss 0.5, 12 B",
        "report",
    ]
