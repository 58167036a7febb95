"""Perplexity and KL divergence against hand computations, on a tiny random model."""

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import NanValues, ScaledValues, planted
from transformers import DynamicCache

from hf_kvattn.evaluation import perplexity
from hf_kvattn.evaluation.common import variants

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_perplexity_is_that_of_a_plain_forward(model, tokens, stride):
    window, prefill, windows = 100, 30, 2
    with torch.no_grad():
        pieces = tokens[: windows * window].view(windows, window)
        logits = model(pieces, use_cache=False).logits[:, prefill - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, prefill:].flatten())
    results = perplexity.measure(
        model, tokens, variants=[], window=window, prefill=prefill, stride=stride, windows=windows
    )
    assert results["settings"]["scored_tokens"] == windows * (window - prefill)
    assert results["rows"][0]["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)


def test_kld_is_zero_against_itself_and_positive_for_a_wrong_cache(model, tokens):
    chosen = [
        planted("again", DynamicCache),
        planted("wrong", ScaledValues),
        *variants.select(["none", "stock-static"]),
    ]
    chosen += variants.select(["kvattn-static", "kvattn-static-fit"])
    results = perplexity.measure(model, tokens, variants=chosen, window=64, prefill=16, stride=5, windows=2)
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["stock-dynamic"] + [variant.name for variant in chosen]
    assert rows["again"]["kld_mean"] == 0.0 and rows["again"]["perplexity_change_pct"] == 0.0
    for name in ("none", "stock-static", "kvattn-static", "kvattn-static-fit"):
        assert abs(rows[name]["kld_mean"]) < 1e-5 and rows[name]["same_top1_pct"] > 99
    assert rows["wrong"]["kld_mean"] > 0.01 and rows["wrong"]["kld_p99"] > rows["wrong"]["kld_mean"]
    assert rows["wrong"]["same_top1_pct"] < 99
    assert rows["none"]["bits_per_element"] is None and rows["stock-dynamic"]["bits_per_element"] == 32.0


def test_kld_has_the_right_direction_and_size():
    stock, own = torch.randn(2, 300, 50, generator=torch.Generator().manual_seed(2))
    nll, kld, _ = perplexity._score(own, torch.zeros(300, dtype=torch.long), stock)
    expected = torch.nn.functional.kl_div(own.log_softmax(-1), stock.softmax(-1), reduction="batchmean")
    assert kld.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(nll) == 300


def test_nan_logits_raise(model, tokens):
    with pytest.raises(FloatingPointError, match="broken"):
        perplexity.measure(model, tokens, variants=[planted("broken", NanValues)], window=20, prefill=10, windows=1)


@pytest.mark.parametrize(("prefill", "stride"), [(1, 1), (10, 7), (10, 500), (19, 3)])
def test_the_schedule_covers_a_window_once(prefill, stride):
    pieces = perplexity.schedule(20, prefill, stride)
    assert [i for start, end in pieces for i in range(start, end)] == list(range(19))
    assert pieces[0] == (0, prefill)


@pytest.mark.parametrize("wrong", [{"prefill": 20}, {"prefill": 0}, {"stride": 0}, {"windows": 0}])
def test_perplexity_refuses_an_impossible_schedule(model, tokens, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        perplexity.measure(model, tokens, variants=[], **({"window": 20, "prefill": 10} | wrong))


SIZES = {"window": 50, "prefill": 20, "stride": 7, "windows": 3}


@pytest.fixture
def begun(monkeypatch):
    """The numbers of the windows that were begun; `begun.broken` is one that raises RuntimeError."""

    class Begun(list):
        broken = None

    begun, run = Begun(), perplexity._run_window

    def note(model, ids, variant, pieces, window, stock):
        begun.append(window)
        if window == begun.broken:
            raise RuntimeError("the machine is switched off")
        return run(model, ids, variant, pieces, window, stock)

    monkeypatch.setattr(perplexity, "_run_window", note)
    return begun


def interrupt(begun, model, tokens, out) -> None:
    """A run that ends in its last window."""
    begun.broken = 2
    with pytest.raises(RuntimeError, match="switched off"):
        perplexity.measure(model, tokens, variants=variants.select(["kvattn-int8"]), out=str(out), **SIZES)
    begun.broken = None
    begun.clear()


def test_a_run_goes_on_from_its_finished_windows(model, tokens, tmp_path, begun):
    chosen, folder = variants.select(["kvattn-int8"]), tmp_path / "out" / "perplexity-windows"
    expected = perplexity.measure(model, tokens, variants=chosen, **SIZES)
    interrupt(begun, model, tokens, folder.parent)
    assert sorted(path.name for path in folder.iterdir()) == ["0.safetensors", "1.safetensors", "settings.json"]
    given = {"variants": chosen, "out": str(folder.parent), **SIZES}
    assert perplexity.measure(model, tokens, **given, resume=True) == expected
    assert set(begun) == {2}
    begun.clear()
    assert perplexity.measure(model, tokens, **given, resume=True) == expected and not begun
    perplexity.measure(model, tokens, **{**given, "windows": 1})  # begins anew
    assert set(begun) == {0} and sorted(path.name for path in folder.iterdir()) == ["0.safetensors", "settings.json"]


@pytest.mark.parametrize(
    "other",
    [{"stride": 8}, {"windows": 2}, {"backend": "sdpa"}, {"variants": []}, {"text_sha256": 1}, {"weights_sha256": 1}],
)
def test_other_settings_are_refused_to_go_on(other, model, tokens, tmp_path, begun):
    interrupt(begun, model, tokens, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {"variants": variants.select(["kvattn-int8"]), "resume": True, "out": str(tmp_path), **SIZES, **other}
    name = next(iter(other))
    if given.pop("text_sha256", None):
        tokens = tokens.flip(0)
    if given.pop("weights_sha256", None):
        model = copy.deepcopy(model)
        torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(ValueError, match=f"perplexity-windows was begun with {name}="):
        perplexity.measure(model, tokens, **given)
    assert not begun and files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_nothing_goes_on_without_a_folder(model, tokens):
    with pytest.raises(ValueError, match="from the output folder, and none was given"):
        perplexity.measure(model, tokens, variants=[], resume=True, **SIZES)


def test_greedy_tokens_are_counted_up_to_the_first_other_one(model, tokens):
    assert perplexity._agreed([1, 2, 3], [1, 2, 3]) == 3 and perplexity._agreed([1, 9, 3], [1, 2, 3]) == 1
    chosen = variants.select(["none", "stock-static", "kvattn-static"])
    sizes = {"window": 40, "prefill": 20, "stride": 10, "windows": 2}
    results = perplexity.measure(model, tokens, variants=chosen, greedy=12, **sizes)
    assert [row["greedy_agreed"] for row in results["rows"]] == [12, None, 12, 12]
    found = perplexity._greedy(model, tokens[None, :20], variants.VARIANTS["stock-dynamic"], 12)
    whole = model.generate(tokens[None, :20], max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert found == whole[0, 20:].tolist()
    assert "same greedy tokens" in perplexity._tables(results)
    results = perplexity.measure(model, tokens, variants=chosen, **sizes)
    assert "same greedy tokens" not in perplexity._tables(results) and results["rows"][0]["greedy_agreed"] is None
