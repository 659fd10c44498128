"""Trace files: four forms, and the given traces' stated mean rates."""

import os
from pathlib import Path

import pytest

from coinfer.errors import DataError
from coinfer.lab.trace import load_trace, mean_rate_bps

ROOT = Path(__file__).parents[3]
TRACES = Path(os.environ.get("DATA_DIR", ROOT / "../shared/data")) / "traces"


def _file(folder: Path, text: str) -> Path:
    path = folder / "trace.file"
    path.write_text(text)
    return path


def test_sabre_pieces_have_their_own_durations(tmp_path: Path) -> None:
    text = '[{"duration_ms": 500, "bandwidth_kbps": 16, "latency_ms": 20}, {"duration_ms": 1500, "bandwidth_kbps": 0}]'
    trace = load_trace(_file(tmp_path, text))
    assert (trace.start_s, trace.rate_bps, trace.duration_s) == ((0.0, 0.5), (16e3, 0.0), 2.0)
    assert mean_rate_bps(trace) == 4e3
    assert trace.name == "trace"


def test_mahimahi_packets_are_counted_in_bins(tmp_path: Path) -> None:
    trace = load_trace(_file(tmp_path, "0\n10\n1000\n2001\n2400\n2500\n"))
    assert trace.rate_bps == (3 * 12e3, 0.0, 3 * 12e3 / 0.5)
    assert (trace.start_s, trace.duration_s) == ((0.0, 1.0, 2.0), 2.5)
    # One packet every millisecond, the example of mahimahi's own description: 12 Mbit/s.
    assert mean_rate_bps(load_trace(_file(tmp_path, "1\n"))) == 12e6


def test_own_rows_last_to_the_next(tmp_path: Path) -> None:
    trace = load_trace(_file(tmp_path, "seconds,bit/s\n0,1000\n2,0\n3,500\n"))
    assert (trace.start_s, trace.rate_bps, trace.duration_s) == ((0.0, 2.0, 3.0), (1000.0, 0.0, 500.0), 4.5)


def test_nettrack_rows_share_the_duration_evenly(tmp_path: Path) -> None:
    rows = ["Timestamp,DL_bitrate,UL_bitrate", "2020.01.31_23.59.59,8,1", "2020.01.31_23.59.59,16,2"]
    path = _file(tmp_path, "\n".join([*rows, "2020.02.01_00.00.00,-,-", "2020.02.01_00.00.01,24,3"]))
    trace = load_trace(path)
    assert (trace.start_s, trace.rate_bps) == ((0.0, 1.0, 2.0), (8e3, 16e3, 24e3))
    assert load_trace(path, column="UL_bitrate").rate_bps == (1e3, 2e3, 3e3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("hello\n1,2\n", "hello"),
        ('[{"duration_ms": 1}]', "bandwidth_kbps"),
        ("[]", "no piece"),
        ("5\n4\n", "decrease"),
        ("5\nfive\n", "five"),
        ("seconds,bit/s\n", "no rows"),
        ("seconds,bit/s\n0,1\n0,2\n", "increase"),
        ("seconds,bit/s\n0,-1\n", "at least 0"),
        ("seconds,bit/s\n0,0\n", "above 0"),
        ("Timestamp,DL_bitrate\n2020,5\n", "2020"),
        ("Timestamp,DL_bitrate\n2020.01.31_23.59.59,-\n", "DL_bitrate"),
    ],
)
def test_what_is_no_trace_gets_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        load_trace(_file(tmp_path, text))
    assert "\n" not in str(caught.value) and "trace.file" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load_trace(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "mbps"),
    [
        ("hsdpa_3g_sabre/report.2010-09-14_2303CEST.json", 0.48),
        ("hsdpa_3g_sabre/report.2010-09-28_1407CEST.json", 2.6),
        ("ghent_4g_sabre/report_train_0001.json", 23),
        ("ghent_4g_sabre/report_foot_0001.json", 42),
        ("mahimahi_lte/ATT-LTE-driving-2016.down", 4.56),
        ("mahimahi_lte/ATT-LTE-driving-2016.up", 1.91),
        ("mahimahi_lte/Verizon-LTE-short.down", 5.03),
        ("ucc_5g/Download_Driving_B_2020.02.14_12.58.17.csv", 4.5),
        ("ucc_5g/Download_Static_B_2020.02.14_13.21.26.csv", 121),
    ],
)
def test_given_traces_have_their_stated_mean(name: str, mbps: float) -> None:
    if not TRACES.is_dir():
        pytest.skip(f"the given traces are not there ({TRACES}); set DATA_DIR")
    assert mean_rate_bps(load_trace(TRACES / name)) / 1e6 == pytest.approx(mbps, rel=0.04)
