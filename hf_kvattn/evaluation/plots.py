"""The plots of the reports: one for each kind of measurement."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hf_kvattn.evaluation.drawing import (
    INK,
    LOWEST_KLD,
    OURS,
    STOCK,
    caption,
    colors_of,
    label_bars,
    label_ends,
    label_points,
    new_figure,
    plain,
    plot_lines,
)
from hf_kvattn.evaluation.variants import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    caption(axes, x="tokens of context")
    label_ends(axes, ends, contexts[-1], top, colors, hooked)
    plain(axes)


def throughput(results: dict[str, Any]) -> Figure:
    """Step time against context, one panel a batch size."""
    batch_sizes = sorted({cell["batch"] for cell in results["cells"]})
    figure = new_figure(6.4 * len(batch_sizes), 4.6, "Time of a decode step inside generate()", results["conditions"])
    colors = colors_of([row for cell in results["cells"] for row in cell["rows"]])
    panels = figure.subplots(1, len(batch_sizes), squeeze=False)[0]
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        _plot_steps(axes, [cell for cell in results["cells"] if cell["batch"] == batch_size], colors)
        caption(axes, title=f"batch {batch_size}")
    caption(panels[0], y="ms a step: median, p20 to p80")
    return figure


def perplexity(results: dict[str, Any]) -> Figure:
    """KL divergence against bits a cached number: lower and further left is better."""
    figure = new_figure(7.0, 4.8, "What a cache does to the predictions", results["conditions"])
    axes = figure.subplots()
    colors = colors_of(results["rows"])
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
    caption(
        axes, x="bits a cached number, scales and residuals included", y=f"KL divergence from {BASELINE}, nats a token"
    )
    plain(axes)
    label_points(axes, points, colors)
    return figure


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def conversion(results: dict[str, Any]) -> Figure:
    """What converting costs by method, before and after uptraining: bars in nats a token, labelled with perplexity."""
    settings, rows = results["settings"], results["rows"]
    title = f"{settings['kv_heads_before']} to {settings['kv_heads_after']} KV heads: perplexity on held-out text"
    figure = new_figure(7.0, 4.4, title, results["conditions"])
    axes = figure.subplots()
    uptrained = [(i, row["uptrained"]) for i, row in enumerate(rows) if "uptrained" in row]
    for label, shift, color, found in (
        ("converted", -0.2, OURS[0], list(enumerate(rows))),
        (f"after {settings['uptrain_steps']} steps of uptraining", 0.2, OURS[2], uptrained),
    ):
        if found:
            bars = axes.bar([i + shift for i, _ in found], [row["loss_nats"] for _, row in found], 0.38, color=color)
            bars.set_label(label)
            label_bars(axes, bars, [_perplexity(row["perplexity"]) for _, row in found])
    axes.axhline(0, color="#777777", linewidth=1, label=f"original: {_perplexity(results['perplexity_before'])}")
    axes.set_xticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.margins(y=0.1)
    caption(axes, y="loss, nats a token; the labels are perplexities")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axes)
    return figure


def calibration(results: dict[str, Any]) -> Figure:
    """The bits of each layer's keys and values above what each costs at equal bits, and the KLD that this gives."""
    layers, bits = results["layers"], results["settings"]["bits"]
    figure = new_figure(max(7.0, 3.6 + 0.24 * len(layers)), 5.0, "Bits where they count", results["conditions"])
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
    caption(axes, title="bits chosen" + (" (-: exact)" if any(x["key_bits"] is None for x in layers) else ""))
    axes.tick_params(length=0, labelbottom=False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes = panels["cost"]
    for part, color, shift in (("key", OURS[0], -0.2), ("value", OURS[1], 0.2)):
        costs = [1000 * layer[f"predicted_{part}_kld"] for layer in layers]
        axes.bar([layer["layer"] + shift for layer in layers], costs, 0.4, color=color, label=f"{part}s")
    caption(axes, x="layer", y=f"predicted KLD at {bits} bits, 1e-3 nats")
    axes.legend(fontsize=8, frameon=False)
    plain(axes)
    for name in ("bits", "cost"):
        panels[name].set_xlim(-0.7, len(layers) - 0.3)
    axes = panels["kld"]
    rows = [row for row in results["rows"] if row["code_bits"] is not None]
    found = [1000 * row["kld_mean"] for row in rows]
    colors = [OURS[0] if row["variant"] == "calibrated" else STOCK[1] for row in rows]
    bars = axes.bar(range(len(rows)), found, 0.6, color=colors)
    label_bars(axes, bars, [f"{value:.2f}" for value in found])
    names = [row["variant"].replace(", groups of ", "\ngroups of ") for row in rows]
    axes.set_xticks(range(len(rows)), [f"{name}\n{row['code_bits']:.2f} bits" for name, row in
                                       zip(names, rows, strict=True)])  # fmt: skip
    caption(axes, title="measured KLD, 1e-3 nats a token")
    axes.margins(y=0.08)
    plain(axes)
    axes.tick_params(axis="x", labelsize=7)
    return figure


def claims(results: dict[str, Any]) -> Figure:
    """Panels of prefill attention's time and memory, decoding with and without a cache, and one layer's cache."""
    figure = new_figure(10.0, 10.5, "What is said of attention and KV caches, measured", results["conditions"])
    panels = figure.subplot_mosaic([["time", "memory"], ["decoding", "decoding"], ["caches", "steps"]])
    names = ("standard", "tiled", "windowed")
    methods = {name: [(row["tokens"], row["methods"][name]) for row in results["attention"] if name in row["methods"]]
               for name in names}  # fmt: skip
    colors = dict(zip(names, ("#444444", *OURS), strict=False))
    lines = {name: [(x, found["ms"]["median"]) for x, found in line] for name, line in methods.items()}
    plot_lines(panels["time"], lines, colors, "prefill attention of one layer: ms")
    lines = {name: [(x, found["extra_bytes"] / 2**20) for x, found in line if found["extra_bytes"]]
             for name, line in methods.items()}  # fmt: skip
    plot_lines(panels["memory"], lines, colors, "prefill attention of one layer: peak MiB")
    rows = [(cell["context"], row) for cell in results["decoding"] for row in cell["rows"]]
    lines = {row["variant"]: [] for _, row in rows}
    for context, row in rows:
        lines[row["variant"]].append((context, row["step_ms"]["median"]))
    plot_lines(panels["decoding"], lines, colors_of([row for _, row in rows]), "a decode step of the model: ms")
    layouts = {name: [(cell["tokens"], cell["layouts"][name]) for cell in results["caches"]]
               for name in results["caches"][0]["layouts"]}  # fmt: skip
    colors = {name: ("#444444", *OURS)[i % 7] for i, name in enumerate(layouts)}
    lines = {name: [(x, found["cache_bytes"] / 2**20) for x, found in line] for name, line in layouts.items()}
    plot_lines(panels["caches"], lines, colors, "one layer's cache: MiB")
    lines = {name: [(x, found["step_ms"]["median"]) for x, found in line] for name, line in layouts.items()}
    plot_lines(panels["steps"], lines, colors, "one layer's decode attention: ms")
    for axes in panels.values():
        caption(axes, x="tokens")
    return figure


def bandwidth(results: dict[str, Any]) -> Figure:
    """What each backend reads a second, and what the machine can."""
    figure = new_figure(6.4, 2.8, "Decode attention against the memory's speed", results["conditions"])
    axes = figure.subplots()
    rows = results["backends"]
    axes.barh(list(rows), [row["bytes_s"] / 1e9 for row in rows.values()], color=OURS[0], height=0.5)
    axes.axvline(results["read_bytes_s"] / 1e9, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(results["read_bytes_s"] / 1e9, 1.0, "reading memory ", fontsize=8, ha="right", va="top", color=INK,
              transform=axes.get_xaxis_transform())  # fmt: skip
    caption(axes, x="GB/s")
    axes.invert_yaxis()
    plain(axes)
    return figure


def beams(results: dict[str, Any]) -> Figure:
    """Bytes that a step of beam search moves, by cache."""
    rows, settings = results["rows"], results["settings"]
    title = f"Beam search: bytes moved a step, {settings['beams']} beams, {settings['context']} tokens"
    figure = new_figure(6.4, 1.3 + 0.45 * len(rows), title, results["conditions"])
    axes = figure.subplots()
    colors = colors_of(rows)
    found = [row["written_bytes"] / 2**20 for row in rows]
    bars = axes.barh(range(len(rows)), found, 0.6, color=[colors[row["variant"]] for row in rows])
    label_bars(axes, bars, [f"{value:.3g}" for value in found])
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.margins(x=0.12)
    caption(axes, x="MiB a step, mean")
    axes.invert_yaxis()
    plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def prefix(results: dict[str, Any]) -> Figure:
    """What a prefix costs to compute, to save and to load, by cache."""
    title = f"A prefix of {results['settings']['context']} tokens: computed, saved, loaded"
    figure = new_figure(6.4, 1.4 + 0.75 * len(results["rows"]), title, results["conditions"])
    axes = figure.subplots()
    parts = (("prefill", "#7d7468"), ("save", OURS[4]), ("load", OURS[0]))
    for i, (name, color) in enumerate(parts):
        found = [row[f"{name}_ms"]["median"] for row in results["rows"]]
        bars = axes.barh([j + 0.26 * (i - 1) for j in range(len(found))], found, 0.24, color=color, label=name)
        label_bars(axes, bars, [f"{value:.3g}" for value in found])
    axes.set_yticks(range(len(results["rows"])), [row["variant"] for row in results["rows"]])
    axes.set_xscale("log")
    axes.margins(x=0.12)
    caption(axes, x="ms, median")
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def stream(results: dict[str, Any]) -> Figure:
    """Perplexity along the stream by cache, and what a prompt costs with the window and without."""
    settings = results["settings"]
    figure = new_figure(10.0, 4.6, "A stream far past what the model was trained on", results["conditions"])
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
    caption(axes, x="position in the stream", title=f"perplexity of each {settings['bucket']} tokens")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    plain(axes)
    lines = {
        name: [(row["tokens"], row[f"{name}_ms"]["median"] / 1e3) for row in results["prompts"]]
        for name in ("full", "windowed")
    }
    plot_lines(panels["prompts"], lines, {"full": "#444444", "windowed": OURS[0]}, "a prompt at once: s")
    caption(panels["prompts"], x="tokens")
    return figure
