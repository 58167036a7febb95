"""Results for people and for programs: JSON, Markdown tables and plots.

A folder holds one `results.json` with a section for each kind of measurement. `write` puts its section in, keeps the
others, and makes `report.md` and the plots again from all of them, so both command lines can write to one folder.
Files appear whole or not at all: they are written under a temporary name and renamed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_kvattn.evaluation.variants import BASELINE, STATIC_BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = ("#0b62d6", "#d9480f", "#0f8b4c", "#a21caf", "#b58900", "#0e7490")
STOCK = ("#444444", "#6b6b6b", "#7d7468", "#66737e", "#8c8273", "#7b8894", "#8f8f8f", "#978d80", "#8793a0")
INK = "#222222"
LOWEST_KLD = 1e-6  # where the plot draws everything below, 0 included
MIB = 2**20


# ---------------------------------------------------------------------------------------------- tables


def _table(header: list[str], rows: list[list[str]]) -> str:
    marks = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows]) + "\n"


def _number(value: float | None, pattern: str = "{:.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def _speedup(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return "{of_medians:.2f}; {paired_median:.2f} ({paired_p20:.2f} to {paired_p80:.2f})".format(**value)


def _cell_table(cell: dict[str, Any]) -> str:
    header = ["cache", "step ms (p20 to p80)", "tok/s", f"faster than {BASELINE}", f"faster than {STATIC_BASELINE}"]
    header += ["first token ms", "prefill tok/s", "cache MiB", "extra MiB", "tokens"]
    rows = [
        [
            row["variant"],
            "{median:.1f} ({p20:.1f} to {p80:.1f})".format(**row["step_ms"]),
            _number(row["decode_tok_s"]),
            *(_speedup(row["speedup"][name]) for name in (BASELINE, STATIC_BASELINE)),
            _number(row["ttft_ms"], "{:.0f}"),
            _number(row["prefill_tok_s"], "{:.0f}"),
            _number(row["cache_bytes"] / MIB),
            _number(row["decode_extra_bytes"] / MIB),
            "{verdict} ({compared})".format(**row["tokens"]),
        ]
        for row in cell["rows"]
    ]
    return f"### Context {cell['context']}, batch {cell['batch']}\n\n" + _table(header, rows) + _differences(cell)


def _differences(cell: dict[str, Any]) -> str:
    lines = [
        f"- {row['variant']}, row {found['row']}: differs from new token {found['new_token'] + 1} on; the stock logits"
        f" of the two tokens are {found['margin']:.4g} apart, a near tie is up to {found['tolerance']:.4g}"
        for row in cell["rows"]
        for found in row["tokens"]["differences"]
        if "margin" in found
    ]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _price_table(prices: list[dict[str, Any]]) -> str:
    if not prices:
        return ""
    header = ["cache", "batch", "contexts", "extra ms a step", "growth", f"share of {BASELINE}'s"]
    header += [f"share of {STATIC_BASELINE}'s"]
    rows = [
        [
            price["variant"],
            str(price["batch"]),
            "{} to {}".format(*price["contexts"]),
            _number(price["extra_ms"]),
            _number(price["growth"], "{:.2f}"),
            *(_number(price["share_of"][name], "{:.2f}") for name in (BASELINE, STATIC_BASELINE)),
        ]
        for price in prices
    ]
    return "### The price of context\n\nA step at the largest context minus a step at the smallest.\n\n" + _table(
        header, rows
    )


def _skipped_list(skipped: list[dict[str, Any]]) -> str:
    if not skipped:
        return ""
    lines = [f"- {item['variant']} at context {item['context']}, batch {item['batch']}: {item['reason']}"
             for item in skipped]  # fmt: skip
    return "### Skipped\n\n" + "\n".join(lines) + "\n"


def _throughput_text(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        "A step is the time between two tokens inside `generate()`, the median of all timed steps. Every variant had "
        f"{settings['rounds']} turns of {settings['block_steps']} steps, of which the first "
        f'{settings["dropped_steps_per_block"]} carries set-up and was dropped. "Faster than" is the ratio of the '
        "medians; then the median of the ratios within each round, with p20 to p80. The first token and the prefill "
        f"were timed once. Extra memory while decoding: {settings['memory_method']}. Tokens are compared with those of "
        f"{BASELINE}, in brackets how many a row; a near tie is {settings['near_tie']}; `differs` is said of lossy "
        "caches.\n"
    )
    tables = [_cell_table(cell) for cell in results["cells"]]
    parts = [notes, *tables, _price_table(results["price_of_context"]), _skipped_list(results["skipped"])]
    return "\n".join(part for part in parts if part)


def _perplexity_text(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"{settings['windows']} windows of {settings['window']} tokens: a prefill of {settings['prefill']}, then "
        f"strides of {settings['stride']} through the cache; {settings['scored_tokens']} predictions scored. KLD is "
        f"KL({BASELINE} || variant) in nats a token. `none` is one forward pass without a cache: what it differs by "
        "is noise of the arithmetic, not of a cache.\n"
    )
    header = ["cache", "perplexity", "change %", "KLD", "KLD p99", "same top-1 %", "bits a number", "cache MiB"]
    rows = [
        [
            row["variant"],
            _number(row["perplexity"], "{:.3f}"),
            _number(row["perplexity_change_pct"], "{:+.2f}"),
            _number(row["kld_mean"], "{:.5f}"),
            _number(row["kld_p99"], "{:.4f}"),
            _number(row["same_top1_pct"], "{:.2f}"),
            _number(row["bits_per_element"], "{:.2f}"),
            _number(row["cache_bytes"] / MIB),
        ]
        for row in results["rows"]
    ]
    return "\n".join(part for part in [notes, _table(header, rows), _skipped_list(results["skipped"])] if part)


def _conditions_text(found: dict[str, Any]) -> str:
    lines = [f"- {key}: `{value}`" for key, value in found.items() if key != "describe"]
    return "\n".join(lines) + f"\n\n```\n{found['describe']}\n```\n"


TITLES: dict[str, str] = {"throughput": "Throughput", "perplexity": "Perplexity"}
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {"throughput": _throughput_text, "perplexity": _perplexity_text}
PLOTS: dict[str, str] = {"throughput": "step_ms.png", "perplexity": "kld_bits.png"}


def table(results: dict[str, Any]) -> str:
    """The Markdown tables of one measurement."""
    return TEXTS[results["kind"]](results)


def render(sections: dict[str, dict[str, Any]]) -> str:
    """`report.md` for the sections of a `results.json`."""
    parts = ["# hf_kvattn: measured results\n"]
    for kind in (kind for kind in TITLES if kind in sections):
        results = sections[kind]
        parts += [f"## {TITLES[kind]}\n", f"![{TITLES[kind]}]({PLOTS[kind]})\n", table(results), "### Conditions\n"]
        parts.append(_conditions_text(results["conditions"]))
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------- plots


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
    figure.text(0.01, 0.925, f"{found['model']}, {found['dtype']}, {place}", ha="left", fontsize=8, color="#666666")
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


DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {"throughput": plot_throughput, "perplexity": plot_perplexity}


# ---------------------------------------------------------------------------------------------- files


def _replace(path: Path, write_to: Callable[[Path], Any]) -> Path:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(out_dir: str | Path) -> dict[str, dict[str, Any]]:
    """The sections that a folder holds so far."""
    path = Path(out_dir) / "results.json"
    if not path.exists():
        return {}
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): move it away or choose another folder") from error
    if not isinstance(sections, dict) or not set(sections) <= set(TITLES):
        raise ValueError(f"{path} holds something else than the sections {list(TITLES)}: choose another folder")
    return sections


def write(results: dict[str, Any], out_dir: str | Path) -> list[Path]:
    """Put the results into the folder's `results.json`, and make its report and this measurement's plot."""
    require_plotting()
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sections = read(folder) | {results["kind"]: results}
    text = json.dumps(sections, indent=1, allow_nan=False)
    return [
        _replace(folder / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8")),
        _replace(folder / "report.md", lambda path: path.write_text(render(sections), encoding="utf-8")),
        _replace(folder / PLOTS[results["kind"]], DRAW[results["kind"]](results).savefig),
    ]


def check_out_dir(out_dir: str | None) -> None:
    """Raise before a long measurement what `write` would raise after it."""
    if out_dir is not None:
        require_plotting()
        read(out_dir)


def finish(results: dict[str, Any], out_dir: str | None, as_json: bool) -> None:
    """The end of a command line: the tables, the files, and the JSON as the last line."""
    print(table(results))
    if out_dir is not None:
        print("written: " + ", ".join(str(path) for path in write(results, out_dir)))
    if as_json:
        print(json.dumps(results, allow_nan=False))
