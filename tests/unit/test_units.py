from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.errors import UsageError
from coinfer.units import format_bytes, format_duration, format_rate, parse_duration_s, parse_rate_bps


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [
        ("1bit/s", 1.0),
        ("100kbit/s", 1e5),
        ("100 Kbit/s", 1e5),
        (" 1.5 Mbit/s ", 1.5e6),
        ("2Gbit/s", 2e9),
        ("3Mbps", 3e6),
        ("731 kB/s", 731 * 8e3),
        ("1MB/s", 8e6),
        (".5 Mbit", 5e5),
        ("1e3 kbit/s", 1e6),
    ],
)
def test_rates_are_read_in_bits_a_second(text, rate_bps):
    assert parse_rate_bps(text) == rate_bps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "1",
        "1 MB",
        "-1 Mbit/s",
        "0 Mbit/s",
        "1 mbit/s",
        "1 Mbit/s/s",
        "1e999 bit/s",
        "1_0 bit/s",
        "nan bit/s",
    ],
)
def test_other_text_is_no_rate(text):
    with pytest.raises(UsageError, match=f'got "{text}"'):
        parse_rate_bps(text)


@pytest.mark.parametrize(
    ("text", "duration_s"), [("20ms", 0.02), ("1.5 s", 1.5), ("2min", 120.0), ("250 us", 0.00025), ("0s", 0.0)]
)
def test_durations_are_read_in_seconds(text, duration_s):
    assert parse_duration_s(text) == duration_s


@pytest.mark.parametrize("text", ["", "5", "-5ms", "5 hours", "1e999s", "5 ms ago"])
def test_other_text_is_no_duration(text):
    with pytest.raises(UsageError, match=f'got "{text}"'):
        parse_duration_s(text)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_rate_bps, parse_duration_s):
        try:
            value = parse(text)
        except UsageError:
            continue
        assert 0 <= value < math.inf


@given(st.floats(1e-3, 1e15))
def test_what_is_printed_is_read_back_to_three_digits(value):
    assert parse_rate_bps(format_rate(value)) == pytest.approx(value, rel=0.006)
    assert parse_rate_bps(format_bytes(value) + "/s") == pytest.approx(8 * value, rel=0.006)


@given(st.floats(1e-9, 1e9))
def test_durations_are_read_back_to_three_digits(value):
    assert parse_duration_s(format_duration(value)) == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (365, "365 B"),
        (999.4, "999 B"),
        (999.6, "1 kB"),
        (1809, "1.81 kB"),
        (2.5e12, "2500 GB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_sizes_change_prefix_where_three_digits_do(value, shown):
    assert format_bytes(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 us"),
        (1e-6, "1 us"),
        (0.0009996, "1 ms"),
        (0.01234, "12.3 ms"),
        (0.9996, "1 s"),
        (12345.0, "12300 s"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_durations_change_unit_where_three_digits_do(value, shown):
    assert format_duration(value) == shown


def test_more_digits_on_request():
    assert format_rate(1234567, digits=5) == "1.2346 Mbit/s"
    assert format_duration(0.0123456, digits=5) == "12.346 ms"
