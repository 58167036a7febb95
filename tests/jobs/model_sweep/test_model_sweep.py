"""Every causal language model of transformers is what docs/models.md says of it: `helpers/model_sweep.py` says how."""

from pathlib import Path

import pytest
from model_sweep import ALLOWED, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, as_page, read_page, verdict_of

from hf_kvattn.kernels import dispatch

PAGE = Path(__file__).parents[3] / "docs/models.md"
STATED = read_page(PAGE.read_text())


def test_the_page_has_a_row_for_each_type():
    assert set(STATED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "python tests/helpers/model_sweep.py docs/models.md"
    assert as_page(STATED) == PAGE.read_text(), "another version of transformers, or a page that was edited"


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_type_is_what_the_page_says(model_type):
    verdict = verdict_of(model_type)
    assert verdict.kind in ALLOWED, verdict
    if STATED[model_type].kind != "cannot be built":  # an environment with more packages may build it
        assert verdict == STATED[model_type]


# What a wrong attention function could leave out, and a type that has it.
LEFT_OUT = {"window": "mistral", "softcap": "gemma2", "s_aux": "gpt_oss", "leftpad": "llama", "scale": "granite"}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_the_sweep_notices_what_is_left_out(what, monkeypatch):
    attend = dispatch.attend

    def wrong(call):
        setattr(call, what, call.q.shape[-1] ** -0.5 if what == "scale" else None)
        return attend(call)

    monkeypatch.setattr(dispatch, "attend", wrong)
    verdict = verdict_of(LEFT_OUT[what])
    assert verdict.kind == "wrong" and "static: wrong: " in verdict.reason, verdict
