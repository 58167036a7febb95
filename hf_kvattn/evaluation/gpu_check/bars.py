"""`BARS`: what the figures of a run are held against, one row a bar; each is computed from the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from hf_kvattn.evaluation.common.timing import ratio
from hf_kvattn.evaluation.gpu_check.running import Found, NotHere
from hf_kvattn.kernels.flash_libraries import LIBRARIES

Stages = dict[str, Found]
LEAST_CAPABILITY = (9, 0)  # of the GPU that the bars of speed are for: an H100, or later
FLASHES = (*(library.name for library in LIBRARIES), "SDPA flash", "flashinfer")
CLEAN = ("clean", "done", "not here")  # how a stage may end
GRAPH, COMPILED = "kvattn static, graph", "stock static, compiled"


class Bar(NamedTuple):
    """One bar: its name, its stage, how its value is computed, the least value (or the greatest), and of what kind."""

    name: str
    stage: str
    value: Callable[[Stages], float]
    limit: float
    at_least: bool = True
    of: str = "speed"  # on a GPU of LEAST_CAPABILITY; "size": on every GPU; "code": in a rehearsal too


def case_of(stages: Stages, stage: str, name: str) -> Found:
    """What was found of a case; NotHere, with the reason, where there is no figure of it."""
    if stage not in stages:
        raise NotHere(f"the stage {stage} was not run")
    record = stages[stage]
    for case in record["cases"]:
        if case["case"] == name:
            if reason := case.get("not_here") or case.get("raised"):
                raise NotHere(f"{name}: {reason}")
            return case
    if reason := record.get("not_here") or record.get("raised"):
        raise NotHere(reason)
    raise NotHere(f"{name}: left out for want of time" if record["left_out"] else f"{name}: not among the cases")


def faster(stages: Stages, stage: str, cell: str, own: str, other: str) -> float:
    """How many times longer `other` takes: the median of the ratios within each round."""
    times = [case_of(stages, stage, f"{cell}: {name}")["ms"] for name in (other, own)]
    complete = min(map(len, times))
    return ratio(times[0][:complete], times[1][:complete])["paired_median"]


def _than_flash(stages: Stages, bits: str) -> float:
    """Against the fastest flash kernel there is, at 32,768 tokens, in the worse of the two batch sizes."""
    found = []
    for cell in ("B1 x 32768", "B8 x 32768"):
        ratios, reasons = [], []
        for flash in FLASHES:
            try:
                ratios.append(faster(stages, "attention", cell, bits, flash))
            except NotHere as reason:
                reasons.append(str(reason))
        if not ratios:
            raise NotHere("; ".join(dict.fromkeys(reasons))[:300])
        found.append(min(ratios))
    return min(found)


def _capacity(stages: Stages, bits: str) -> float:
    exact, coded = (case_of(stages, "attention", f"B1 x 32768: {name}") for name in ("exact", bits))
    return exact["bytes"] / coded["bytes"]


def _sdpa_growth(stages: Stages) -> float:
    found = case_of(stages, "sdpa", "auto at 64 growing lengths")
    return found["new_us"]["median"] / found["met_us"]["median"]


def _layers(stages: Stages) -> float:
    return case_of(stages, "memory", "offloaded steps")["layers"]


def _launches(stages: Stages) -> float:
    """Of a layer in a graph: all kernels and copies that the profiler sees of its op, in the worst of the caches."""
    cases = [case["case"] for case in stages.get("graphs", {}).get("cases", []) if case["case"].endswith(", a layer")]
    return max(case_of(stages, "graphs", name)["launches"] for name in cases or ["static, a layer"])


def _unclean(stages: Stages, only: str | None = None) -> float:
    """How many stages, or cases of one stage, are not right; stages that this machine cannot have do not count."""
    if only is None:
        return sum(record["status"] not in CLEAN for record in stages.values())
    if only not in stages:
        raise NotHere(f"the stage {only} was not run")
    if stages[only]["status"] in ("left out", "unfinished", "not here"):
        raise NotHere(f"the stage {only}: {stages[only]['status']}")
    return max(stages[only]["status"] != "clean", sum(case.get("ok") is not True for case in stages[only]["cases"]))


_8K = partial(faster, stage="steps", cell="B1 x 8192")
BARS: tuple[Bar, ...] = (
    Bar(
        "static cache with graphs, 8,192 tokens, batch 8: times as fast as DynamicCache with flash_attention_2",
        "steps", partial(faster, stage="steps", cell="B8 x 8192", own=GRAPH, other="stock dynamic, flash"), 1.5,
    ),
    Bar(
        "static cache with graphs, 8,192 tokens, batch 1: times as fast as StaticCache, compiled",
        "steps", partial(_8K, own=GRAPH, other=COMPILED), 1.0,
    ),
    *(
        Bar(f"{bits} attention at 32,768 tokens: times as fast as bfloat16 flash", "attention",
            partial(_than_flash, bits=bits), 1.0)
        for bits in ("int4", "int8")
    ),
    *(
        Bar(f"{bits}: times the capacity of bfloat16", "attention", partial(_capacity, bits=bits), least, of="size")
        for bits, least in (("int4", 3.1), ("int8", 1.85))
    ),
    *(
        Bar(f"int4 whole step, 8,192 tokens: times as fast as {other}", "steps",
            partial(_8K, own="kvattn int4, graph", other=f"stock {other} int4"), 3.0)
        for other in ("quanto", "hqq")
    ),
    Bar("a length that SDPA has not met: times one that it has", "sdpa", _sdpa_growth, 3.0, at_least=False),
    Bar("offload: layers on the GPU at most", "memory", _layers, 2.0, at_least=False, of="size"),
    Bar("kernels of a layer in a graph, to store and attend", "graphs", _launches, 4, at_least=False, of="size"),
    Bar("forwards that wait for the GPU", "sync", partial(_unclean, only="sync"), 0, at_least=False, of="code"),
    Bar("stages that are not clean", "all", _unclean, 0, at_least=False, of="code"),
)  # fmt: skip


def judge(stages: Stages, capability: Sequence[int], rehearsed: bool) -> list[dict[str, Any]]:
    """Each bar: `held`, `missed`, or `not measured` with the reason; speed is never held by a rehearsal."""
    judged, weak = [], tuple(capability) < LEAST_CAPABILITY
    for bar in BARS:
        found: dict[str, Any] = {"bar": bar.name, "stage": bar.stage, "limit": bar.limit, "at_least": bar.at_least}
        try:
            value = found["value"] = float(bar.value(stages))
            held = value >= bar.limit if bar.at_least else value <= bar.limit
            found["state"] = "held" if held else "missed"
            if rehearsed and bar.of != "code":
                found |= {"state": "not measured", "why": "rehearsed"}
            elif weak and bar.of == "speed":
                found |= {"state": "not measured", "why": "the bar is for an H100 or later"}
        except NotHere as reason:
            found |= {"state": "not measured", "why": str(reason)}
        judged.append(found)
    return judged


def median_ms(case: Found) -> float | None:
    """Of all rounds of a case; None where it has no times."""
    return statistics.median(ms for one in case["ms"] for ms in one) if case.get("ms") else None
