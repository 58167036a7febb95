"""What the plots are drawn with: figures with their conditions, colours by cache, lines, and labels that keep apart."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from itertools import cycle, product
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_kvattn.evaluation.common.variants import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

OURS = ("#0b62d6", "#d9480f", "#0f8b4c", "#a21caf", "#b58900", "#0e7490")
STOCK = ("#444444", "#6b6b6b", "#7d7468", "#66737e", "#8c8273", "#7b8894", "#8f8f8f", "#978d80", "#8793a0")
INK = "#222222"
LOWEST_KLD = 1e-6  # where the plot draws everything below, 0 included


def require_plotting() -> None:
    """Raise before a long measurement rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need the package matplotlib: pip install hf_kvattn[eval]")


def new_figure(width: float, height: float, title: str, found: dict[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    place = f"{found['cpu']}, {found['threads']} threads" if found["device"] == "cpu" else found["device"]
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    weights = f", {found['weights']} weights" if "weights" in found else ""
    subtitle = f"{found['model']}, {found['dtype']}{weights}, {place}"
    figure.text(0.01, 1 - 0.345 / height, subtitle, ha="left", fontsize=8, color="#666666")
    return figure


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#555555", labelsize=8)


def caption(axes: Axes, x: str | None = None, y: str | None = None, title: str | None = None) -> None:
    """Names of the axes, and of the panel above its left end."""
    for put, text in ((axes.set_xlabel, x), (axes.set_ylabel, y), (partial(axes.set_title, loc="left"), title)):
        if text is not None:
            put(text, fontsize=9, color=INK)


def mark(axes: Axes, x: float, text: str, dashes: tuple[int, int], **style: Any) -> None:
    """A dashed line across the panel at `x`, with its name at the top."""
    axes.axvline(x, color=INK, linewidth=1, linestyle=(0, dashes))
    axes.text(x, 1.0, text, fontsize=8, va="top", color=INK, transform=axes.get_xaxis_transform(), **style)


def label_bars(axes: Axes, bars: BarContainer, labels: list[str]) -> None:
    """The text at the end of each bar."""
    axes.bar_label(bars, labels, fontsize=8, color=INK, padding=2)


def name_rows(axes: Axes, rows: list[dict[str, Any]], x: str) -> None:
    """Horizontal bars, one row a cache from the top down, with room for the texts at their ends."""
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.margins(x=0.12)
    caption(axes, x=x)
    axes.invert_yaxis()
    plain(axes)
    axes.grid(axis="y", visible=False)


def colors_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A colour for each variant by name: strong ones for ours, greys for the stock ones, the baseline's first."""
    hooked = {row["variant"]: row["hooked"] for row in rows}
    stock = sorted((name for name in hooked if not hooked[name]), key=lambda name: name != BASELINE)
    return dict(zip(filter(hooked.get, hooked), cycle(OURS), strict=False)) | dict(
        zip(stock, cycle(STOCK), strict=False)
    )


def apart(values: list[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """The values moved, as little as can be, until neighbours are `gap` apart and, if they fit, within low and high.

    Less a gap for each value below, this is isotonic regression, here by its max-min formula.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    levels = [values[i] - gap * rank for rank, i in enumerate(order)]
    moved = list(values)
    for rank, i in enumerate(order):
        ends = range(rank + 1, len(order) + 1)
        level = max(min(fmean(levels[start:end]) for end in ends) for start in range(rank + 1))
        moved[i] = max(low, min(level, high - gap * (len(order) - 1))) + gap * rank
    return moved


def _name(
    axes: Axes, text: str, xy: tuple[float, float], color: str, bold: bool, line: dict[str, Any], **more: Any
) -> Any:
    """A name, and the line that leads to what it names."""
    weight = "bold" if bold else "normal"
    arrow = {"arrowstyle": "-", "color": color} | line
    return axes.annotate(text, xy, va="center", fontsize=8, color=color, fontweight=weight, arrowprops=arrow, **more)


def label_ends(
    axes: Axes,
    ends: list[tuple[str, float, float]],
    last_context: int,
    top: float,
    colors: dict[str, str],
    hooked: set[str],
) -> None:
    """Name every line beside its right end; lines that end early or leave the panel say their last value."""
    heights = apart([min(y, top) for _, _, y in ends], gap=0.047 * top, low=0.0, high=top)
    for (name, x, y), height in zip(ends, heights, strict=True):
        text = f"{name}  {y:.0f}" + ("" if x == last_context else f" at {x:.0f}") + (" \u2191" if y > top else "")
        line = {"linewidth": 0.6, "alpha": 0.7 if y <= top else 0.0, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
        place = {"xytext": (1.05, height / top), "textcoords": "axes fraction", "annotation_clip": False}
        _name(axes, text, (last_context * 1.03, min(y, top)), colors[name], name in hooked, line, **place)


def label_points(axes: Axes, points: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """Name every point, ours first, at the nearest place beside it that covers no point and no other name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    canvas: Any = axes.figure.canvas
    canvas.draw()  # fixes the layout, so that data can be turned into pixels
    at = {row["variant"]: (row["bits_per_element"], max(row["kld_mean"], LOWEST_KLD)) for row in points}
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in map(axes.transData.transform, at.values())]
    inside = axes.get_window_extent()
    places = sorted(product(range(-12, 13), (1, -1)), key=lambda place: (abs(place[0]), -place[1], place[0]))
    line = {"linewidth": 0.5, "shrinkA": 0}
    for row in sorted(points, key=lambda row: not row["hooked"]):
        name = row["variant"]
        label = _name(
            axes, name, at[name], colors[name], row["hooked"], line, xytext=(0, 0), textcoords="offset points"
        )
        label.set_in_layout(False)
        for lines, side in places:
            label.set(position=(9 * side, 10.5 * lines), horizontalalignment="left" if side > 0 else "right")
            label.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(label, canvas.get_renderer())  # the annotation's own includes its line
            if inside.count_contains(box.corners()) == 4 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        label.arrow_patch.set_visible(lines != 0)


def plot_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]], colors: dict[str, str], title: str) -> None:
    """One panel of lines on logarithmic axes, each with its name in the legend."""
    from matplotlib.ticker import LogLocator, NullLocator

    for i, (name, line) in enumerate(lines.items()):
        if line:
            x, y = zip(*sorted(line), strict=True)
            width = 1.6 + 0.4 * (len(lines) - 1 - i)  # a line below another stays visible
            axes.plot(x, y, marker="o", markersize=width + 2, linewidth=width, color=colors[name], label=name)
    ticks = sorted({x for line in lines.values() for x, _ in line})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter("{x:,g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    caption(axes, title=title)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    plain(axes)
