"""The command `chat`, as a pipe sees it."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from talking import save_talking_model

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.integrations import chat
from hf_kvattn.tools import commands, inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_talking_model(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def lengths(monkeypatch):
    """Of every forward, its new tokens."""
    found: list[int] = []
    load = inputs.load_model

    def loaded(*args):
        model, tokenizer = load(*args)
        model.get_input_embeddings().register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
        return model, tokenizer

    monkeypatch.setattr(inputs, "load_model", loaded)
    return found


def run(monkeypatch, capsys, folder, said: str, *options: str) -> tuple[list[str], list[str]]:
    """The lines on stdout and on stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    capsys.readouterr()
    arguments = ["chat", str(folder), "--dtype", "float32", "--max-new-tokens", "30", *options]
    assert commands.main(arguments) == 0
    out, err = capsys.readouterr()
    return out, [line for line in err.splitlines() if line.startswith("[")]


def answers(folder, turns: list[str], cache=None, system=None, new_tokens: int = 30) -> list[str]:
    """What `generate()` says: each turn anew, or with one cache that goes on."""
    model, tokenizer = inputs.load_model(str(folder), torch.float32)
    model = hf_kvattn.enable(model, cache="static")
    messages, found = [] if system is None else [{"role": "system", "content": system}], []
    for text in turns:
        messages.append({"role": "user", "content": text})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**given, max_new_tokens=new_tokens, past_key_values=cache)
        found.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


TURNS = ["Hello there, who is it?", "And what comes next?"]


@pytest.mark.parametrize("cache", ["static", "int4"])
def test_two_turns_through_a_pipe(folder, lengths, monkeypatch, capsys, cache):
    out, said = run(monkeypatch, capsys, folder, "\n".join(TURNS), "--cache", cache)
    prompts = [n for n in lengths if n > 1]
    going_on = None if cache == "static" else hf_kvattn.QuantizedKVCache(inputs.load_config(str(folder)), bits=4)
    expected = answers(folder, TURNS, going_on)
    assert out == "".join(f"{answer}\n" for answer in expected)
    first = len("[user]" + TURNS[0]) + 1 + len("[assistant]")
    second = 1 + 1 + len("[user]" + TURNS[1]) + 1 + len("[assistant]")  # and the answer's last token
    assert prompts == [first, second]
    seen = first + 29 + second + 29
    assert [line.split(" ")[0] for line in said] == [f"[{first + 29}", f"[{seen}"]
    mib = re.findall(r"context, ([\d.]+) MiB of cache, [\d.]+ tok/s\]", "".join(said))
    assert len(mib) == 2 and (float(mib[0]) >= 0.1) == (cache == "static")  # in float32 and in 4 bits


def test_reset_begins_anew_and_exit_ends(folder, lengths, monkeypatch, capsys):
    said = f"{TURNS[0]}\n\n/reset\n{TURNS[0]}\n/exit\n{TURNS[1]}\n"
    out, lines = run(monkeypatch, capsys, folder, said, "--cache", "static", "--system", "Be brief.")
    (answer,) = answers(folder, TURNS[:1], system="Be brief.")
    assert out == f"{answer}\n" * 2 and len(lines) == 2
    assert len({n for n in lengths if n > 1}) == 1  # both computed the whole prompt


def test_a_turn_that_is_interrupted_is_taken_back(folder, monkeypatch, capsys):
    stream = chat.TextStreamer.put
    calls: list[int] = []

    def interrupted(self, value):
        calls.append(1)
        if len(calls) == 40:  # in the second turn
            raise KeyboardInterrupt
        stream(self, value)

    monkeypatch.setattr(chat.TextStreamer, "put", interrupted)
    out, lines = run(monkeypatch, capsys, folder, f"{TURNS[0]}\nWait\n{TURNS[1]}\n", "--cache", "static")
    assert out.startswith(answers(folder, TURNS)[0]) and out.endswith(answers(folder, TURNS)[1] + "\n")
    assert lines[1] == "[taken back]" and len(lines) == 3


def test_what_does_not_fit_is_said_and_the_chat_goes_on(tmp_path, monkeypatch, capsys):
    folder = save_talking_model(tmp_path, max_position_embeddings=80)
    out, lines = run(monkeypatch, capsys, folder, f"{TURNS[0]}\n{'x' * 70}\n/reset\n{'y' * 50}\n", "--cache", "static")
    shown = answers(folder, TURNS[:1])[0] + "\n" + answers(folder, ["y" * 50], new_tokens=80 - 68)[0] + "\n"
    assert out == shown
    assert re.fullmatch(r"\[the chat has \d+ tokens, and 80 fit, the answer included: /reset\]", lines[1])
    assert lines[2].startswith("[79 tokens")  # the answer ends where the model does


def test_what_cannot_chat_is_refused(folder, monkeypatch, capsys):
    model, tokenizer = inputs.load_model(str(folder), torch.float32)
    with pytest.raises(ValueError, match=r"makes no such cache: call hf_kvattn.enable"):
        chat.Chat(model, tokenizer)
    hf_kvattn.enable(model, cache=StaticKVCache)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        chat.Chat(model, tokenizer)
    capsys.readouterr()
    assert commands.main(["chat", "./nope"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no such model: './nope' is no folder or file here, and no id of the hub")
