"""What one request of a plan takes, as a straight line in the link's seconds a bit and the edge's load.

A pilot on a device, or a simulation, prices the plans of a menu thousands of times a second: of each it needs
a few numbers, read once from the price list that all else is priced by.
"""

from __future__ import annotations

from typing import NamedTuple

from ..profile import Conditions
from ..stages import cost, row_of, stages
from .estimate import Table


class Line(NamedTuple):
    """The typical request of a plan on one device: seconds of each machine (the edge's at load 1), bits each way.

    `share` of the requests cross; `exchange_s` is the fixed cost of one that does.
    """

    device_s: float
    up_bits: float
    down_bits: float
    edge_s: float
    share: float
    exchange_s: float

    def latency_s(
        self,
        rate_bps: float,
        *,
        base_s: float,
        load: float = 1.0,
        wait_s: float = 0.0,
        backlog_s: float = 0.0,
        own_load: float = 1.0,
    ) -> float:
        """Seconds of a request: its bytes wait until the link is free, its tail until the edge is.

        `base_s` is the link's round trip without the bytes, `load` and `own_load` factors on the edge's and the
        device's times.
        """
        device_s = self.device_s * own_load
        if self.share == 0:
            return device_s
        link_s = max(0.0, backlog_s - device_s) + (self.up_bits + self.down_bits) / rate_bps + base_s
        return device_s + self.share * (link_s + self.exchange_s + self.edge_s * load + wait_s)


def lines_of(table: Table, base: Conditions) -> dict[int, Line]:
    """The lines of all candidates, by plan number; `base` says how fast the device is."""
    return {int(number): _line(table, row, base) for row, number in enumerate(table.numbers)}


def _line(table: Table, row: int, base: Conditions) -> Line:
    work = row_of(table.work, row)
    parts = {stage.name: stage for stage in stages(work, is_typical=True)}
    own_s = sum(float(parts[name].share * cost(parts[name], base).busy_s) for name in ("head", "exit", "encode"))
    return Line(
        device_s=own_s,
        up_bits=8.0 * float(parts["send"].num_bytes),
        down_bits=8.0 * float(parts["reply"].num_bytes),
        edge_s=float(cost(parts["decode"], base).busy_s + cost(parts["tail"], base).busy_s),
        share=float(work.remote_share),
        exchange_s=base.exchange_s,
    )
