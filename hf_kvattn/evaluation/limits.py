"""Limits and negative results: what came out badly in each kind of measurement, said in its model card."""

from __future__ import annotations

from typing import Any

from hf_kvattn.evaluation.stated import disagreements
from hf_kvattn.evaluation.variants import BASELINE

NOTABLE = 0.97  # a share below this is said, one above it is the noise of the machine
LOSS_NATS = 0.005  # a conversion's loss above this is said: half a percent of perplexity
VERDICTS = {
    "MISMATCH": "wrong tokens",
    "near_tie": "other tokens than stock from a near tie on",
    "differs": "other tokens than stock, as lossy caches may",
}


def of_throughput(results: dict[str, Any]) -> list[str]:
    """Where ours are slower or larger, the worst case of each, and whose tokens differ."""
    worse: dict[str, list[tuple[float, str]]] = {}
    differing: dict[str, list[str]] = {}
    for cell in results["cells"]:
        stock = {row["variant"]: row for row in cell["rows"]}[BASELINE]
        fastest_ms = min(row["step_ms"]["median"] for row in cell["rows"])
        where = f"{cell['context']} x {cell['batch']}"
        for row in (row for row in cell["rows"] if row["hooked"]):
            shares = {
                "decodes at {} of the fastest cache's speed": fastest_ms / row["step_ms"]["median"],
                f"prefills at {{}} of {BASELINE}'s speed": row["prefill_tok_s"] / stock["prefill_tok_s"],
                f"{BASELINE} allocates {{}} of its bytes": stock["cache_bytes"] / row["cache_bytes"],
            }
            for text, share in shares.items():
                if share < NOTABLE:
                    worse.setdefault(f"{row['variant']}: {text}", []).append((share, where))
        for row in cell["rows"]:
            if row["tokens"]["verdict"] in VERDICTS:
                differing.setdefault(f"{row['variant']}: {VERDICTS[row['tokens']['verdict']]}", []).append(where)
    lines = [
        f"{text.format(f'{min(found)[0]:.2f}')} or more (context x batch: {', '.join(where for _, where in found)})."
        for text, found in worse.items()
    ]
    lines += [f"{text} (context x batch: {', '.join(found)})." for text, found in differing.items()]
    return lines + _skipped(results)


def of_conversion(results: dict[str, Any]) -> list[str]:
    """What each method costs, before and after uptraining, and whether the written one is the best of them."""
    settings, rows = results["settings"], results["rows"]
    last = {row["method"]: row.get("uptrained", row)["loss_nats"] for row in rows}
    lines = [f"{settings['scored_tokens']} predictions of one text were scored: other texts may lose more."]
    for row in (row for row in rows if row["loss_nats"] > LOSS_NATS):
        after = f", {last[row['method']]:.3f} after uptraining" if "uptrained" in row else ""
        lines.append(f"{row['method']} loses {row['loss_nats']:.3f} nats a token{after}.")
    written, best = rows[0]["method"], min(last, key=last.__getitem__)
    if written != best:
        lines.append(f"The checkpoint was made by {written}, though {best} loses less.")
    if not settings["uptrain_steps"]:
        lines.append("It was not trained after the conversion.")
    return lines


def of_perplexity(results: dict[str, Any]) -> list[str]:
    lines = [
        f"{results['settings']['scored_tokens']} predictions of one text were scored: small differences are noise."
    ]
    for row in (row for row in results["rows"] if row["hooked"] and row["perplexity_change_pct"] > 0.5):
        lines.append(
            f"{row['variant']} changes perplexity by {row['perplexity_change_pct']:+.2f} %, and agrees with "
            f"{BASELINE} on {row['same_top1_pct']:.1f} % of the tokens."
        )
    return lines + _skipped(results)


def of_claims(results: dict[str, Any]) -> list[str]:
    wrong = disagreements(results)
    lines = [f"{len(wrong)} of {len(results['claims'])} stated figures were not confirmed: see the reasons under them."]
    return lines + _skipped(results)


def of_bandwidth(results: dict[str, Any]) -> list[str]:
    share = max(row["share"] for row in results["backends"].values())
    return [f"No backend reads keys and values at more than {share:.2f} of the memory's speed."]


def of_prefix(results: dict[str, Any]) -> list[str]:
    wrong = [row["variant"] for row in results["rows"] if not row["same_tokens"]]
    lines = ["Files were loaded from the page cache: a disk that reads slower than memory adds its own time."]
    return lines + [f"{name}: other tokens after loading than before saving." for name in wrong]


def of_stream(results: dict[str, Any]) -> list[str]:
    lines = ["One text was streamed: others may need more of what a window has left behind."]
    for row in results["rows"]:
        change = row["last_over_recomputed_pct"]
        if change is not None and change > 5:
            lines.append(f"{row['variant']}: perplexity at the end {change:+.0f} % against a recomputation.")
    return lines


def of_beams(results: dict[str, Any]) -> list[str]:
    wrong = [row["variant"] for row in results["rows"] if row["same_tokens"] is False]
    lines = ["What beams have in common, and so what need not be moved, depends on the text."]
    return lines + [f"{name}: other tokens than the default cache gives." for name in wrong]


LIMITS = {
    "conversion": of_conversion,
    "perplexity": of_perplexity,
    "calibration": of_perplexity,
    "throughput": of_throughput,
    "claims": of_claims,
    "bandwidth": of_bandwidth,
    "prefix": of_prefix,
    "stream": of_stream,
    "beams": of_beams,
}


def _skipped(results: dict[str, Any]) -> list[str]:
    return [
        f"Not measured: {item['variant']} at context {item['context']}, batch {item['batch']}: {item['reason']}."
        for item in results["skipped"]
    ]
