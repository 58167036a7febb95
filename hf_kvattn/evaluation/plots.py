"""The plots of the reports: one for each kind of measurement."""

from __future__ import annotations

import importlib.util
import math
from itertools import product
from typing import TYPE_CHECKING, Any

from hf_kvattn.evaluation.variants import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = ("#0b62d6", "#d9480f", "#0f8b4c", "#a21caf", "#b58900", "#0e7490")
STOCK = ("#444444", "#6b6b6b", "#7d7468", "#66737e", "#8c8273", "#7b8894", "#8f8f8f", "#978d80", "#8793a0")
INK = "#222222"
LOWEST_KLD = 1e-6  # where the plot draws everything below, 0 included


def require_plotting() -> None:
    """Raise before a long measurement rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need the package matplotlib: pip install hf_kvattn[eval]")


def _new_figure(width: float, height: float, title: str, found: dict[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    place = f"{found['cpu']}, {found['threads']} threads" if found["device"] == "cpu" else found["device"]
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    below_title = 1 - 0.345 / height
    figure.text(
        0.01, below_title, f"{found['model']}, {found['dtype']}, {place}", ha="left", fontsize=8, color="#666666"
    )
    return figure


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#555555", labelsize=8)


def _colors(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A colour for each variant by name: strong ones for ours, greys for the stock ones."""
    names = {row["variant"]: row["hooked"] for row in rows}
    ours = [name for name, hooked in names.items() if hooked]
    stock = sorted((name for name, hooked in names.items() if not hooked), key=lambda name: name != BASELINE)
    return {name: OURS[i % len(OURS)] for i, name in enumerate(ours)} | {
        name: STOCK[i % len(STOCK)] for i, name in enumerate(stock)
    }


def _apart(values: list[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """The values moved until neighbours are at least `gap` apart and, if they fit, within low and high."""
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []
    for i in order:  # merged with the group below while they would touch
        groups.append([i])
        while len(groups) > 1 and (
            _bottom(values, groups[-1], gap, low, high) - _bottom(values, groups[-2], gap, low, high)
            < gap * len(groups[-2])
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(values)
    for group in groups:
        for rank, i in enumerate(group):
            moved[i] = _bottom(values, group, gap, low, high) + rank * gap
    return moved


def _bottom(values: list[float], group: list[int], gap: float, low: float, high: float) -> float:
    """Where the lowest of a group goes: the group is centred on its mean, and kept within low and high."""
    length = gap * (len(group) - 1)
    centred = sum(values[i] for i in group) / len(group) - length / 2
    return max(low, min(centred, high - length))


def _plot_steps(axes: Axes, cells: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """One panel: step time against context, for one batch size."""
    lines: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["context"]):
        for row in cell["rows"]:
            lines.setdefault(row["variant"], []).append((cell["context"], row["step_ms"]))
    hooked = {row["variant"] for cell in cells for row in cell["rows"] if row["hooked"]}
    cached = [step["median"] for name, line in lines.items() if name != "none" for _, step in line]
    top = 1.15 * max(cached)  # decoding without a cache would flatten all the others: its line leaves the panel
    ends: list[tuple[str, float, float]] = []
    for name, line in lines.items():
        x = [float(context) for context, _ in line]
        median = [step["median"] for _, step in line]
        front = 3 if name in hooked else 2
        style: dict[str, Any] = {"color": colors[name], "zorder": front}
        axes.plot(x, median, marker="o", markersize=4, linewidth=2.4 if name in hooked else 1.3, **style)
        axes.fill_between(x, [s["p20"] for _, s in line], [s["p80"] for _, s in line], alpha=0.18, linewidth=0, **style)
        ends.append((name, x[-1], median[-1]))
    contexts = sorted(cell["context"] for cell in cells)
    axes.set_xscale("log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    axes.set_ylim(0, top)
    axes.set_xlabel("tokens of context", fontsize=9, color=INK)
    _label_ends(axes, ends, contexts[-1], top, colors, hooked)
    _plain(axes)


def _label_ends(
    axes: Axes,
    ends: list[tuple[str, float, float]],
    last_context: int,
    top: float,
    colors: dict[str, str],
    hooked: set[str],
) -> None:
    """Name every line beside its right end; lines that end early or leave the panel say their last value."""
    texts = [f"{name}  {y:.0f}" + ("" if x == last_context else f" at {x:.0f}") + (" \u2191" if y > top else "")
             for name, x, y in ends]  # fmt: skip
    heights = _apart([min(y, top) for _, _, y in ends], gap=0.047 * top, low=0.0, high=top)
    for (name, _, y), text, height in zip(ends, texts, heights, strict=True):
        axes.annotate(
            text,
            xy=(last_context * 1.03, min(y, top)),
            xytext=(1.05, height / top),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colors[name],
            fontweight="bold" if name in hooked else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colors[name],
                "linewidth": 0.6,
                "alpha": 0.7 if y <= top else 0.0,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def plot_throughput(results: dict[str, Any]) -> Figure:
    """Step time against context, one panel a batch size."""
    batch_sizes = sorted({cell["batch"] for cell in results["cells"]})
    figure = _new_figure(6.4 * len(batch_sizes), 4.6, "Time of a decode step inside generate()", results["conditions"])
    colors = _colors([row for cell in results["cells"] for row in cell["rows"]])
    panels = figure.subplots(1, len(batch_sizes), squeeze=False)[0]
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        _plot_steps(axes, [cell for cell in results["cells"] if cell["batch"] == batch_size], colors)
        axes.set_title(f"batch {batch_size}", loc="left", fontsize=9, color=INK)
    panels[0].set_ylabel("ms a step: median, p20 to p80", fontsize=9, color=INK)
    return figure


def plot_perplexity(results: dict[str, Any]) -> Figure:
    """KL divergence against bits a cached number: lower and further left is better."""
    figure = _new_figure(7.0, 4.8, "What a cache does to the predictions", results["conditions"])
    axes = figure.subplots()
    colors = _colors(results["rows"])
    points = [row for row in results["rows"] if row["bits_per_element"] is not None and row["variant"] != BASELINE]
    for row in results["rows"]:
        if row["variant"] == "none":
            level = max(row["kld_mean"], LOWEST_KLD)
            axes.axhline(level, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.text(0.005, level, "no cache: noise of the arithmetic", fontsize=7.5, color="#777777", va="bottom",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yscale("log")
    for row in points:
        axes.scatter(
            row["bits_per_element"],
            max(row["kld_mean"], LOWEST_KLD),
            s=60 if row["hooked"] else 34,
            color=colors[row["variant"]],
            zorder=3 if row["hooked"] else 2,
        )
    bits = [4.0, 16.0, *(row["bits_per_element"] for row in points)]
    levels = [max(row["kld_mean"], LOWEST_KLD) for row in results["rows"] if row["variant"] != BASELINE] or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(bits) / 1.4, max(bits) * 1.9)
    axes.set_ylim(10 ** math.floor(math.log10(min(levels) / 1.5)), 10 ** math.ceil(math.log10(max(levels) * 1.5)))
    ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 12, 16, 32) if min(bits) / 1.4 < tick <= max(bits)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bits a cached number, scales and residuals included", fontsize=9, color=INK)
    axes.set_ylabel(f"KL divergence from {BASELINE}, nats a token", fontsize=9, color=INK)
    _plain(axes)
    _label_points(axes, points, colors)
    return figure


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def plot_conversion(results: dict[str, Any]) -> Figure:
    """What converting costs by method, before and after uptraining: bars in nats a token, labelled with perplexity."""
    settings, rows = results["settings"], results["rows"]
    title = f"{settings['kv_heads_before']} to {settings['kv_heads_after']} KV heads: perplexity on held-out text"
    figure = _new_figure(7.0, 4.4, title, results["conditions"])
    axes = figure.subplots()
    uptrained = [(i, row["uptrained"]) for i, row in enumerate(rows) if "uptrained" in row]
    for label, shift, color, found in (
        ("converted", -0.2, OURS[0], list(enumerate(rows))),
        (f"after {settings['uptrain_steps']} steps of uptraining", 0.2, OURS[2], uptrained),
    ):
        if found:
            bars = axes.bar([i + shift for i, _ in found], [row["loss_nats"] for _, row in found], 0.38, color=color)
            bars.set_label(label)
            axes.bar_label(bars, [_perplexity(row["perplexity"]) for _, row in found], fontsize=8, color=INK, padding=2)
    axes.axhline(0, color="#777777", linewidth=1, label=f"original: {_perplexity(results['perplexity_before'])}")
    axes.set_xticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.margins(y=0.1)
    axes.set_ylabel("loss, nats a token; the labels are perplexities", fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _plain(axes)
    return figure


def plot_calibration(results: dict[str, Any]) -> Figure:
    """The bits of each layer's keys and values above what each costs at equal bits, and the KLD that this gives."""
    layers, bits = results["layers"], results["settings"]["bits"]
    figure = _new_figure(max(7.0, 3.6 + 0.24 * len(layers)), 5.0, "Bits where they count", results["conditions"])
    panels = figure.subplot_mosaic(
        [["bits", "kld"], ["cost", "kld"]], width_ratios=[3.2, 1], height_ratios=[1, 2], gridspec_kw={"wspace": 0.08}
    )
    axes = panels["bits"]
    shades = {2: "#dbe9f9", 3: "#a9cbf0", 4: "#6ba3e2", 8: "#0b4aa2", None: "#222222"}
    for y, part in enumerate(("key", "value")):
        for layer in layers:
            chosen, x = layer[f"{part}_bits"], layer["layer"]
            axes.bar(x, 0.9, width=0.92, bottom=0.55 - y, color=shades[chosen])
            axes.text(x, 1 - y, "-" if chosen is None else str(chosen), ha="center", va="center", fontsize=8,
                      color="white" if chosen in (8, None) else INK)  # fmt: skip
    axes.set_yticks([1, 0], ["keys", "values"], fontsize=9, color=INK)
    axes.set_title("bits chosen" + (" (-: exact)" if any(x["key_bits"] is None for x in layers) else ""),
                   loc="left", fontsize=9, color=INK)  # fmt: skip
    axes.tick_params(length=0, labelbottom=False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes = panels["cost"]
    for part, color, shift in (("key", OURS[0], -0.2), ("value", OURS[1], 0.2)):
        costs = [1000 * layer[f"predicted_{part}_kld"] for layer in layers]
        axes.bar([layer["layer"] + shift for layer in layers], costs, 0.4, color=color, label=f"{part}s")
    axes.set_ylabel(f"predicted KLD at {bits} bits, 1e-3 nats", fontsize=9, color=INK)
    axes.set_xlabel("layer", fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    for name in ("bits", "cost"):
        panels[name].set_xlim(-0.7, len(layers) - 0.3)
    axes = panels["kld"]
    rows = [row for row in results["rows"] if row["code_bits"] is not None]
    found = [1000 * row["kld_mean"] for row in rows]
    colors = [OURS[0] if row["variant"] == "calibrated" else STOCK[1] for row in rows]
    bars = axes.bar(range(len(rows)), found, 0.6, color=colors)
    axes.bar_label(bars, [f"{value:.2f}" for value in found], fontsize=8, color=INK, padding=2)
    names = [row["variant"].replace(", groups of ", "\ngroups of ") for row in rows]
    axes.set_xticks(range(len(rows)), [f"{name}\n{row['code_bits']:.2f} bits" for name, row in
                                       zip(names, rows, strict=True)])  # fmt: skip
    axes.set_title("measured KLD, 1e-3 nats a token", loc="left", fontsize=9, color=INK)
    axes.margins(y=0.08)
    _plain(axes)
    axes.tick_params(axis="x", labelsize=7)
    return figure


def _label_points(axes: Axes, points: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """Name every point, ours first, at the nearest place beside it that covers no point and no other name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    canvas: Any = axes.figure.canvas
    canvas.draw()  # fixes the layout, so that data can be turned into pixels
    taken: list[Bbox] = []
    for row in points:
        x, y = axes.transData.transform((row["bits_per_element"], max(row["kld_mean"], LOWEST_KLD)))
        taken.append(Bbox.from_bounds(x - 9, y - 9, 18, 18))
    inside = axes.get_window_extent()
    places = sorted(product(range(-12, 13), (1, -1)), key=lambda place: (abs(place[0]), -place[1], place[0]))
    for row in sorted(points, key=lambda row: not row["hooked"]):
        label: Any = axes.annotate(
            row["variant"],
            xy=(row["bits_per_element"], max(row["kld_mean"], LOWEST_KLD)),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colors[row["variant"]],
            fontweight="bold" if row["hooked"] else "normal",
            arrowprops={"arrowstyle": "-", "color": colors[row["variant"]], "linewidth": 0.5, "shrinkA": 0},
        )
        label.set_in_layout(False)
        for lines, side in places:
            label.set_position((9 * side, 10.5 * lines))
            label.set_horizontalalignment("left" if side > 0 else "right")
            label.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(label, canvas.get_renderer())  # the annotation's own includes its line
            within = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        label.arrow_patch.set_visible(lines != 0)


def _plot_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]], colors: dict[str, str], title: str) -> None:
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
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    _plain(axes)


def plot_claims(results: dict[str, Any]) -> Figure:
    """Panels of prefill attention's time and memory, decoding with and without a cache, and one layer's cache."""
    figure = _new_figure(10.0, 10.5, "What is said of attention and KV caches, measured", results["conditions"])
    panels = figure.subplot_mosaic([["time", "memory"], ["decoding", "decoding"], ["caches", "steps"]])
    names = ("standard", "tiled", "windowed")
    methods = {name: [(row["tokens"], row["methods"][name]) for row in results["attention"] if name in row["methods"]]
               for name in names}  # fmt: skip
    colors = dict(zip(names, ("#444444", *OURS), strict=False))
    lines = {name: [(x, found["ms"]["median"]) for x, found in line] for name, line in methods.items()}
    _plot_lines(panels["time"], lines, colors, "prefill attention of one layer: ms")
    lines = {name: [(x, found["extra_bytes"] / 2**20) for x, found in line if found["extra_bytes"]]
             for name, line in methods.items()}  # fmt: skip
    _plot_lines(panels["memory"], lines, colors, "prefill attention of one layer: peak MiB")
    rows = [(cell["context"], row) for cell in results["decoding"] for row in cell["rows"]]
    lines = {row["variant"]: [] for _, row in rows}
    for context, row in rows:
        lines[row["variant"]].append((context, row["step_ms"]["median"]))
    _plot_lines(panels["decoding"], lines, _colors([row for _, row in rows]), "a decode step of the model: ms")
    layouts = {name: [(cell["tokens"], cell["layouts"][name]) for cell in results["caches"]]
               for name in results["caches"][0]["layouts"]}  # fmt: skip
    colors = {name: ("#444444", *OURS)[i % 7] for i, name in enumerate(layouts)}
    lines = {name: [(x, found["cache_bytes"] / 2**20) for x, found in line] for name, line in layouts.items()}
    _plot_lines(panels["caches"], lines, colors, "one layer's cache: MiB")
    lines = {name: [(x, found["step_ms"]["median"]) for x, found in line] for name, line in layouts.items()}
    _plot_lines(panels["steps"], lines, colors, "one layer's decode attention: ms")
    for axes in panels.values():
        axes.set_xlabel("tokens", fontsize=9, color=INK)
    return figure


def plot_bandwidth(results: dict[str, Any]) -> Figure:
    """What each backend reads a second, and what the machine can."""
    figure = _new_figure(6.4, 2.8, "Decode attention against the memory's speed", results["conditions"])
    axes = figure.subplots()
    rows = results["backends"]
    axes.barh(list(rows), [row["bytes_s"] / 1e9 for row in rows.values()], color=OURS[0], height=0.5)
    axes.axvline(results["read_bytes_s"] / 1e9, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(results["read_bytes_s"] / 1e9, 1.0, "reading memory ", fontsize=8, ha="right", va="top", color=INK,
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xlabel("GB/s", fontsize=9, color=INK)
    axes.invert_yaxis()
    _plain(axes)
    return figure


def plot_beams(results: dict[str, Any]) -> Figure:
    """Bytes that a step of beam search moves, by cache."""
    rows, settings = results["rows"], results["settings"]
    title = f"Beam search: bytes moved a step, {settings['beams']} beams, {settings['context']} tokens"
    figure = _new_figure(6.4, 1.3 + 0.45 * len(rows), title, results["conditions"])
    axes = figure.subplots()
    colors = _colors(rows)
    found = [row["written_bytes"] / 2**20 for row in rows]
    bars = axes.barh(range(len(rows)), found, 0.6, color=[colors[row["variant"]] for row in rows])
    axes.bar_label(bars, [f"{value:.3g}" for value in found], fontsize=8, color=INK, padding=2)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.margins(x=0.12)
    axes.set_xlabel("MiB a step, mean", fontsize=9, color=INK)
    axes.invert_yaxis()
    _plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def plot_prefix(results: dict[str, Any]) -> Figure:
    """What a prefix costs to compute, to save and to load, by cache."""
    title = f"A prefix of {results['settings']['context']} tokens: computed, saved, loaded"
    figure = _new_figure(6.4, 1.4 + 0.75 * len(results["rows"]), title, results["conditions"])
    axes = figure.subplots()
    parts = (("prefill", "#7d7468"), ("save", OURS[4]), ("load", OURS[0]))
    for i, (name, color) in enumerate(parts):
        found = [row[f"{name}_ms"]["median"] for row in results["rows"]]
        bars = axes.barh([j + 0.26 * (i - 1) for j in range(len(found))], found, 0.24, color=color, label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in found], fontsize=8, color=INK, padding=2)
    axes.set_yticks(range(len(results["rows"])), [row["variant"] for row in results["rows"]])
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("ms, median", fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def plot_stream(results: dict[str, Any]) -> Figure:
    """Perplexity along the stream by cache, and what a prompt costs with the window and without."""
    settings = results["settings"]
    figure = _new_figure(10.0, 4.6, "A stream far past what the model was trained on", results["conditions"])
    panels = figure.subplot_mosaic([["stream", "stream", "prompts"]])
    axes = panels["stream"]
    styles = [(OURS[0], 2.6, "-"), (OURS[4], 1.2, (0, (4, 3))), (OURS[1], 1.4, "-"), ("#444444", 1.4, "-")]
    if len(results["rows"]) < len(styles):
        styles = [styles[0], *styles[-len(results["rows"]) + 1 :]]
    for row, (color, width, line) in zip(results["rows"], styles, strict=True):
        x = [point["position"] for point in row["points"]]
        y = [point["perplexity"] for point in row["points"]]
        axes.plot(x, y, color=color, linewidth=width, linestyle=line, label=row["variant"])
    end = settings["tokens"]
    axes.plot([end - settings["last"], end], [results["recomputed_perplexity"]] * 2, color=OURS[2], linewidth=3,
              label="recomputed")  # fmt: skip
    axes.axvline(settings["trained_positions"], color=INK, linewidth=1, linestyle=(0, (2, 3)))
    axes.text(settings["trained_positions"], 1.0, " trained on", fontsize=8, va="top", color=INK,
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"perplexity of each {settings['bucket']} tokens", loc="left", fontsize=9, color=INK)
    axes.set_xlabel("position in the stream", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    _plain(axes)
    lines = {
        name: [(row["tokens"], row[f"{name}_ms"]["median"] / 1e3) for row in results["prompts"]]
        for name in ("full", "windowed")
    }
    _plot_lines(panels["prompts"], lines, {"full": "#444444", "windowed": OURS[0]}, "a prompt at once: s")
    panels["prompts"].set_xlabel("tokens", fontsize=9, color=INK)
    return figure
