"""The plots of the report; needs matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .results import Row, best_peer, groups, our_row

Pairs = list[tuple[dict[str, Any], Row]]


def draw_machine(pairs: Pairs, folder: Path, name: str, stale: Callable[[Row], bool]) -> list[str]:
    """All plots of one machine; returns the names of the files. `stale` says whether a kernel has changed since."""
    run, rows = max((run for run, _ in pairs), key=lambda run: run["started"]), [row for _, row in pairs]
    drawn = []
    for kind, figure in (
        ("ratios", _ratios(rows, stale)),
        ("roofline", _roofline(rows, run)),
        ("volumes", _volumes(rows)),
    ):
        if figure is None:
            continue
        figure.axes[0].set_title(run["device_name"], fontsize=9, loc="left")
        figure.savefig(folder / f"{name}-{kind}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)
        drawn.append(f"{name}-{kind}.png")
    return drawn


def _ratios(rows: list[Row], stale: Callable[[Row], bool]) -> Any:
    """Best peer's time over ours, forward and backward together where there is a backward."""
    bars = []
    for (op, case, mode), group in groups(rows).items():
        mine, peer = our_row(group), best_peer(group)
        whole = "fwdbwd" if any(r["mode"] == "fwdbwd" for r in rows if (r["op"], r["case"]) == (op, case)) else "fwd"
        if mine and peer and mode == whole:
            note = " (stale)" if stale(mine) or stale(peer) else ""
            bars.append((f"{op}: {case}{note}", peer["median_ms"] / mine["median_ms"]))
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.2 * len(bars)))
    labels, values = zip(*reversed(bars))
    # From 1 on a logarithmic axis: half as fast is as long as twice as fast.
    colors = ["tab:blue" if value >= 1 else "tab:orange" for value in values]
    drawn = axes.barh(labels, [value - 1 for value in values], left=1, color=colors)
    axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(min(0.5, *values) / 1.3, max(2.0, *values) * 1.3)
    axes.set_xlabel("speed-up over the best peer")
    axes.margins(y=0.5 / len(bars))
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _roofline(rows: list[Row], run: dict[str, Any]) -> Any:
    """FLOP/s over FLOPs per byte, under the measured ceilings."""
    mine = [row for group in groups(rows).values() if (row := our_row(group)) and row["flops"]]
    if not mine:
        return None
    figure, axes = plt.subplots(figsize=(7, 5))
    intensities = [row["flops"] / row["min_bytes"] for row in mine]
    grid = [min(intensities) / 2 * (4 * max(intensities) / min(intensities)) ** (i / 100) for i in range(101)]
    copy = run["ceilings"]["copy_gb_s"]
    for dtype in sorted({row["dtype"] for row in mine}):
        peak = run["ceilings"]["matmul_tflop_s"].get(dtype)
        if peak is not None:
            axes.plot(grid, [min(copy * i / 1000, peak) for i in grid], label=f"ceiling, {dtype}")
    for op, group in groups(mine, lambda row: row["op"]).items():
        axes.scatter([row["flops"] / row["min_bytes"] for row in group], [r["tflop_s"] for r in group], s=14, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="TFLOP/s")
    axes.legend(fontsize=7)
    return figure


def _volumes(rows: list[Row]) -> Any:
    """Time and extra memory of a training step of the model over the size of the volume, if there are several."""
    steps = [row for row in rows if row["op"] == "snet" and row["mode"] == "fwdbwd" and row["status"] == "ok"]
    if len({row["shape"]["voxels"] for row in steps}) < 2:
        return None
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for provider, group in groups(steps, lambda row: row["provider"]).items():
        group = sorted(group, key=lambda row: row["shape"]["voxels"])
        voxels = [row["shape"]["voxels"] / 1e6 for row in group]
        time.plot(voxels, [row["median_ms"] / 1000 for row in group], "o-", label=provider)
        memory.plot(voxels, [(row["peak_extra_bytes"] or 0) / 1e9 for row in group], "o-", label=provider)
    _label(time, "seconds per training step")
    _label(memory, "GB beyond weights and gradients")
    return figure


def _label(axes: Axes, text: str) -> None:
    axes.set(xlabel="million voxels", ylabel=text)
    axes.legend(fontsize=7)
