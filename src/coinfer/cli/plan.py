"""`coinfer plan`: every candidate ranked for given conditions, and why the first won."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ..bundle import Bundle, load_bundle
from ..errors import UsageError
from ..plan import Candidate
from ..profile import RADIOS, Arrivals, Profile
from ..units import format_bytes, format_duration, parse_duration_s
from .conditions import Options, conditions_of, load_profile
from .options import (
    BundleFolder,
    EdgeLoad,
    GoalName,
    Int8Slowdown,
    Json,
    MaxBytes,
    MaxLatency,
    MaxLoss,
    MaxMemory,
    MaxSize,
    MinRate,
    Rate,
    RoundTrip,
    Slowdown,
)
from .output import note, print_json, print_table

if TYPE_CHECKING:
    from ..search.solve import Goal, Ranking


def plan(
    bundle: BundleFolder,
    rate: Rate = "1Mbit/s",
    rtt: RoundTrip = "10ms",
    goal: GoalName = None,
    max_loss: MaxLoss = None,
    max_latency: MaxLatency = None,
    min_rate: MinRate = None,
    max_bytes: MaxBytes = None,
    max_size: MaxSize = None,
    max_device_memory: MaxMemory = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            "--pin", metavar="PATTERN=SIDE", help="Layers that must run on one machine, such as 'layer1.*=device'.",
            show_default=False,
        ),
    ] = None,
    slowdown: Slowdown = None,
    int8_slowdown: Int8Slowdown = None,
    edge_load: EdgeLoad = 1.0,
    device_profile: Annotated[
        Path | None,
        typer.Option(
            "--device-profile",
            metavar="FILE",
            help="The device's times, as `coinfer profile -o` wrote them there.",
            show_default=False,
        ),
    ] = None,
    edge_profile: Annotated[
        Path | None,
        typer.Option("--edge-profile", metavar="FILE", help="The same for the edge.", show_default=False),
    ] = None,
    device_power: Annotated[
        float | None,
        typer.Option("--device-power", help="Watts of the device while computing, for energy.", show_default=False),
    ] = None,
    radio: Annotated[
        str | None,
        typer.Option("--radio", help=f"Power of sending: {', '.join(RADIOS)}.", show_default=False),
    ] = None,
    radio_tail: Annotated[
        float,
        typer.Option("--radio-tail", help="Joules that the radio takes after a request, until it sleeps again."),
    ] = 0.0,
    max_energy: Annotated[
        float | None,
        typer.Option("--max-energy", metavar="MILLIJOULES", help="Most millijoules of a request.", show_default=False),
    ] = None,
    arrival_rate: Annotated[
        float | None,
        typer.Option(
            "--arrival-rate", metavar="HZ", help="Requests that come on and on, a second of each device.",
            show_default=False,
        ),
    ] = None,
    poisson: Annotated[bool, typer.Option("--poisson", help="They come by chance, not evenly.")] = False,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices like this one on the edge.")] = 1,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Requests that the edge computes at a time.")] = 1,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests that the edge computes together at most.")
    ] = 1,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Show the plans that no other beats in everything at once.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw latency and loss of all plans (.png).", show_default=False),
    ] = None,
    top_n: Annotated[int, typer.Option("--top-n", min=1, help="Rows of the table.")] = 10,
    json: Json = False,
) -> None:
    """Choose a plan for a link, and say why.

    Ranks every candidate of a bundle for this link, this device and this edge: what won and why, what each
    constraint cost, and what was rejected.

    All figures are estimates from measured bytes, times and accuracies. Losses are of the images
    that choices are made on; the chosen plan's figure on unseen images stands beside it.
    """
    from ..report.table import front_table
    from ..search.goal import pin_of
    from ..search.machines import with_profiles
    from ..search.pareto import pareto_front
    from ..search.solve import search

    loaded = load_bundle(bundle)
    of_device = None if device_profile is None else load_profile(device_profile, loaded)
    if device_power is None and of_device is not None:
        device_power = of_device.power_w
    if arrival_rate is None and (poisson or devices > 1):
        raise UsageError("--poisson and --devices need --arrival-rate beside them")
    arrivals = None
    if arrival_rate is not None:
        arrivals = Arrivals(rate_hz=arrival_rate, is_random=poisson, devices=devices)
    options = Options(
        rate, rtt, slowdown, int8_slowdown, edge_load, device_power, radio, radio_tail, arrivals, workers, max_batch
    )
    conditions = conditions_of(loaded, options)
    if max_energy is not None and (conditions.device_power_w is None or conditions.radio is None):
        raise UsageError("--max-energy needs --device-power (or a device profile with a measured power) and --radio")
    candidates = with_profiles(
        loaded.candidates(),
        device=of_device,
        edge=_edge_profile(loaded, edge_profile, max_batch),
    )
    asked = goal_of(loaded, goal, max_loss)
    wanted = msgspec.structs.replace(
        asked,
        max_latency_s=None if max_latency is None else parse_duration_s(max_latency),
        min_throughput_hz=min_rate,
        max_bytes=max_bytes,
        max_device_bytes=asked.max_device_bytes if max_size is None else max_size,
        max_device_memory_bytes=asked.max_device_memory_bytes if max_device_memory is None else max_device_memory,
        max_energy_j=asked.max_energy_j if max_energy is None else max_energy / 1e3,
        pins=tuple(pin_of(text, loaded.manifest.cuts) for text in pin or ()),
    )
    ranking = search(candidates, conditions, wanted)
    built = loaded.manifest
    is_other_stream = built.goal != "throughput" and (wanted.minimise == "throughput" or min_rate is not None)
    if wanted.max_loss_points < built.max_loss_points or is_other_stream:
        note(
            f"the bundle was built for {built.goal} at losses up to {built.max_loss_points:g} points: what is better "
            "for another goal or a stricter limit may have been dropped; build with these in [goal] to have it all"
        )
    on_menu = {entry.number for entry in loaded.manifest.menu}
    front = pareto_front(ranking) if pareto or plot is not None else ()
    if plot is not None:
        from ..report.front_plot import plot_front

        plot_front(plot, ranking, front, title=f"{loaded.manifest.model}: plans that no other beats in everything")
    if json:
        numbers = [candidates[index].plan.number for index in front]
        print_json(_as_json(ranking, candidates, on_menu) | ({"pareto": numbers} if pareto else {}))
    elif pareto:
        print_table(front_table(ranking, front))
    else:
        _print(ranking, on_menu, top_n)


def _edge_profile(bundle: Bundle, file: Path | None, max_batch: int) -> Profile | None:
    """The edge's times: another machine's, or, for times of batches, the building machine's."""
    if file is not None:
        return load_profile(file, bundle)
    return bundle.profile() if max_batch > 1 and bundle.profile().batches else None


def goal_of(bundle: Bundle, minimise: str | None, max_loss: float | None) -> Goal:
    """The goal of the options, with the bundle's own where an option is absent.

    Raises:
        UsageError: the objective is unknown, or the loss is below 0.
    """
    from ..search.goal import OBJECTIVES
    from ..search.planmap import built_goal

    own = built_goal(bundle.manifest)
    minimise = own.minimise if minimise is None else minimise
    if minimise not in OBJECTIVES:
        raise UsageError(f'--goal must be one of {", ".join(OBJECTIVES)}, got "{minimise}"')
    limit = own.max_loss_points if max_loss is None else max_loss
    if not limit >= 0:
        raise UsageError(f"--max-loss must be at least 0 points, got {limit:g}")
    return msgspec.structs.replace(own, minimise=minimise, max_loss_points=limit)


def _entry(ranking: Ranking, candidates: list[Candidate], place: int, on_menu: set[int]) -> dict[str, Any]:
    row = ranking.rows[place]
    plan, evidence = candidates[row.index].plan, candidates[row.index].evidence
    reported = candidates[row.index].reported
    return {
        "plan": plan.number,
        "kind": plan.kind,
        "way": plan.way,
        "variant": plan.variant,
        "precision": plan.precision,
        "cut": plan.cut,
        "codec": None if plan.codec is None else plan.codec.name,
        "exits": [
            {"cut": exit.cut, "side": exit.side, "rule": exit.rule, "share": share}
            for exit, share in zip(plan.exits, evidence.exit_shares, strict=True)
        ],
        "bytes": evidence.payload_bytes,
        "wire_bytes": row.wire_bytes,
        "loss": evidence.loss_points,
        "loss_reported": None if reported is None else reported.loss_points,
        "latency_s": row.latency_s,
        "throughput_hz": row.throughput_hz,
        "energy_j": row.energy_j,
        "on_menu": plan.number in on_menu,
        "rejected": row.rejected,
    }


def _as_json(ranking: Ranking, candidates: list[Candidate], on_menu: set[int]) -> dict[str, Any]:
    entries = [_entry(ranking, candidates, place, on_menu) for place in range(len(ranking.rows))]
    return {
        "goal": ranking.goal,
        "chosen": entries[0],
        "reason": ranking.reason,
        "constraints": [
            {
                "name": cost.name,
                "limit": cost.limit,
                "objective": cost.objective,
                "objective_without": cost.objective_without,
                "plan_without": candidates[cost.index_without].plan.number,
            }
            for cost in ranking.constraint_costs
        ],
        "candidates": entries,
    }


def _print(ranking: Ranking, on_menu: set[int], top_n: int) -> None:
    from ..report.table import ranking_table

    print_table(ranking_table(ranking, limit=top_n))
    best = ranking.table.candidates[ranking.best]
    print(f"Why: {ranking.reason}")
    if best.reported is not None and best.reported.loss_points is not None:
        print(
            f"On {best.reported.num_images} pictures that no choice has seen, plan {best.plan.number} "
            f"loses {best.reported.loss_points:.2f} points."
        )
    if best.plan.number not in on_menu:
        print(f"Plan {best.plan.number} is not on the bundle's menu: build with this link and device in the job.")
    for cost in ranking.constraint_costs:
        print(_cost_text(cost.name, cost.limit, cost.objective, cost.objective_without, ranking.goal.minimise))


def _cost_text(name: str, limit: float, with_it: float, without: float, objective: str) -> str:
    if with_it == without:
        return f"The constraint {name} = {limit:g} cost nothing."
    show: dict[str, Callable[[float], str]] = {
        "latency": format_duration,
        "bytes": format_bytes,
        "throughput": lambda hz: f"{hz:.3g} a second",
        "energy": lambda joules: f"{joules:.3g} J",
        "accuracy": lambda points: f"{points:.3g} points lost",
    }
    text = show[objective]
    return f"The constraint {name} = {limit:g} cost {text(without)} -> {text(with_it)}."
