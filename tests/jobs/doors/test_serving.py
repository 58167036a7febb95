"""The command `serve` and its app, asked by the `openai` client over loopback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
import uvicorn
from talking import save_talking_model

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.integrations import serving
from hf_kvattn.integrations.prefixes import PrefixStore, fresh_cache
from hf_kvattn.integrations.server import build_app
from hf_kvattn.tools import commands, inputs

LIMIT = 400  # tokens of prompt and answer
SYSTEM = {"role": "system", "content": "You are a helpful assistant, and you say what you know of this house."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_talking_model(tmp_path_factory.mktemp("talking"), max_position_embeddings=LIMIT)


class Served:
    """A model that answers, what its forwards computed, and a client."""

    def __init__(self, folder, cache: str | None, prefixes, batching: bool = False):
        self.model, self.tokenizer = inputs.load_model(str(folder), torch.float32)
        hf_kvattn.enable(self.model, cache=cache)
        self.lengths: list[int] = []
        self.delay_s = 0.0
        self.model.get_input_embeddings().register_forward_pre_hook(self._note)
        self.app = build_app(self.model, self.tokenizer, "tiny", prefixes, batching)

    def _note(self, module, args) -> None:
        self.lengths.append(args[0].shape[1])
        time.sleep(self.delay_s)

    @property
    def prompts(self) -> list[int]:
        """New tokens of each forward since the last call, steps left out."""
        found, self.lengths[:] = [n for n in self.lengths if n > 1], []
        return found

    def ids(self, messages) -> torch.Tensor:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def direct(self, ids: torch.Tensor, new_tokens: int, cache=None) -> str:
        """What `generate()` says without a server."""
        cache = fresh_cache(self.model) if cache is None else cache
        out = self.model.generate(input_ids=ids, max_new_tokens=new_tokens, past_key_values=cache)
        self.lengths.clear()
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def ask(self, *messages, new_tokens: int = 20, **options):
        return self.client.chat.completions.create(
            model="tiny", messages=list(messages), max_tokens=new_tokens, **options
        )

    def answers(self, questions) -> list[str]:
        """To all questions at once; every second one is streamed."""

        def answer(i: int) -> str:
            if i % 2:
                return said(self.ask(*questions[i], stream=True))
            return self.ask(*questions[i]).choices[0].message.content

        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(answer, range(len(questions))))


@contextlib.contextmanager
def answering(folder, cache: str | None = "static", prefixes="memory", batching: bool = False):
    served = Served(folder, cache, PrefixStore(None) if prefixes == "memory" else prefixes, batching)
    server = uvicorn.Server(uvicorn.Config(served.app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    served.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    served.client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=100)
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(30)
        served.app.state.generation.shutdown()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def plain(folder):
    with answering(folder) as served:
        yield served


@pytest.fixture
def served(plain):
    plain.lengths.clear()
    return plain


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_a_chat_a_stream_and_a_completion_say_what_generate_says(served):
    question = user("What is this?")
    expected = served.direct(served.ids([question]), 20)
    answer = served.ask(question)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == served.ids([question]).shape[1] and answer.usage.completion_tokens == 20
    chunks = list(served.ask(question, stream=True))
    assert said(chunks) == expected and len(chunks) > 10 and chunks[-1].choices[0].finish_reason == "length"
    prompt = "Once upon a time there was"
    ids = served.tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = served.direct(ids, 15)
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 15}
    assert served.client.completions.create(**asked).choices[0].text == expected
    stream = served.client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    response = served.client.responses.create(model="tiny", input="What is this?", max_output_tokens=20, stream=False)
    assert response.output_text == served.direct(served.ids([question]), 20)


def test_the_one_model_is_listed_and_another_is_refused(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError) as error:
        served.client.chat.completions.create(model="other", messages=[user("?")])
    assert "pinned to 'tiny'; requested 'other'" in error.value.response.text
    body = json.dumps({"model": "other"}).encode()
    asked = urllib.request.Request(f"{served.url}/load_model", body, {"Content-Type": "application/json"})
    assert "this server has 'tiny' alone" in urllib.request.urlopen(asked, timeout=30).read().decode()
    urllib.request.urlopen(urllib.request.Request(f"{served.url}/reset", b""), timeout=30)
    assert served.ask(user("What is this?")).choices[0].message.content  # it stays
    assert json.load(urllib.request.urlopen(f"{served.url}/health", timeout=30)) == {"status": "ok"}


@pytest.mark.parametrize("cache", ["static", "int4"])
def test_a_turn_computes_its_new_tokens_alone(folder, cache):
    with answering(folder, cache) as served:
        messages, going_on = [SYSTEM], fresh_cache(served.model)
        for turn, text in enumerate(("What is this?", "And what else?", "Go on, please.")):
            messages.append(user(text))
            ids, before = served.ids(messages), going_on.get_seq_length()
            expected = served.direct(ids, 20, going_on)
            if turn == 1:
                assert said(served.ask(*messages, stream=True)) == expected
            else:
                assert served.ask(*messages).choices[0].message.content == expected
            assert served.prompts == [ids.shape[1] - before]
            messages.append({"role": "assistant", "content": expected})
        other = [SYSTEM, user("Something quite different?")]
        served.ask(*other)
        begin = len("[system]") + len(SYSTEM["content"]) + 1 + len("[user]")
        known = begin if cache == "static" else 4 + (begin - 4) // 32 * 32
        assert served.prompts == [served.ids(other).shape[1] - known]


def test_without_prefixes_every_prompt_is_computed_anew(folder):
    with answering(folder, prefixes=None) as served:
        ids, expected = served.ids([SYSTEM, user("?")]), served.direct(served.ids([SYSTEM, user("?")]), 20)
        for _ in range(2):
            assert served.ask(SYSTEM, user("?")).choices[0].message.content == expected
        assert served.prompts == [ids.shape[1]] * 2


def test_four_at_once_get_their_own_answers(served):
    questions = [[SYSTEM, user(f"Question {i}: {'x' * 10 * i}")] for i in range(4)]
    expected = [served.direct(served.ids(each), 20) for each in questions]
    assert served.answers(questions) == expected


def test_requests_run_together_in_a_continuous_batch(folder):
    with answering(folder, None, None, batching=True) as served:
        questions = [[SYSTEM, user(f"Question {i}: {'x' * 30 * i}")] for i in range(4)]
        expected = [served.direct(served.ids(each), 20, StaticKVCache(served.model.config)) for each in questions]
        assert served.answers(questions) == expected
        assert any(1 < n <= 4 for n in served.lengths)  # steps of several requests
        with pytest.raises(openai.BadRequestError, match=f"prompt and answer may have {LIMIT}"):
            served.ask(user("x" * LIMIT))
        assert served.ask(*questions[0]).choices[0].message.content == expected[0]


def test_a_client_that_leaves_does_not_hold_up_the_next(served):
    question = [SYSTEM, user("Tell me all of it.")]
    expected = served.direct(served.ids(question), 20)
    served.delay_s = 0.02
    try:
        stream = served.ask(*question, stream=True, new_tokens=250)
        for _, chunk in zip(range(4), stream, strict=False):
            assert chunk.choices
        stream.close()
        assert served.ask(*question).choices[0].message.content == expected
    finally:
        served.delay_s = 0.0
    steps = len(served.lengths) - 20
    assert 3 <= steps < 200  # the first answer ended early


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_and_the_server_goes_on(served, stream):
    long, ids = user("x" * LIMIT), served.ids([user("x" * LIMIT)])
    match = rf"the prompt has {ids.shape[1]} tokens, and prompt and answer may have {LIMIT}"
    with pytest.raises(openai.BadRequestError, match=match) as error:
        served.ask(long, stream=stream)
    assert error.value.type == "invalid_request_error" and not served.lengths
    room = served.ask(user("x" * (LIMIT - 30)), new_tokens=1000)
    assert room.usage.total_tokens == LIMIT and room.choices[0].finish_reason == "length"


def test_what_the_cache_cannot_hold_is_refused(folder):
    model, tokenizer = inputs.load_model(str(folder), torch.float32)
    hf_kvattn.enable(model, cache=lambda config: hf_kvattn.StaticKVCache(config, max_cache_len=60))
    app = build_app(model, tokenizer, "tiny", PrefixStore(None))
    assert app.state.generation.get_manager("tiny@main").limit == 60


def test_stop_strings_end_an_answer(served):
    question = user("What is this?")
    whole = served.ask(question, new_tokens=40).choices[0].message.content
    stop = whole[12:14]
    found = served.ask(question, new_tokens=40, stop=[stop]).choices[0].message.content
    assert found == whole[: whole.index(stop) + 2] and len(found) < 40


def test_a_bad_argument_is_the_clients(served):
    with pytest.raises(openai.BadRequestError, match="top_p.* has to be a float"):
        served.ask(user("?"), top_p=-1.0, extra_body={"generation_config": '{"do_sample": true}'})
    with pytest.raises(openai.BadRequestError):
        served.ask(user("?"), extra_body={"generation_config": "{no json"})
    assert served.ask(user("?")).choices[0].message.content


def test_prefixes_outlive_the_server_and_a_poisoned_file_does_not_matter(folder, tmp_path, caplog):
    question = [SYSTEM, user("What is this?")]
    with answering(folder, prefixes=PrefixStore(tmp_path)) as served:
        expected = served.direct(served.ids(question), 20)
        assert served.ask(*question).choices[0].message.content == expected
    length = served.ids(question).shape[1]
    with answering(folder, prefixes=PrefixStore(tmp_path)) as served:
        assert served.ask(*question).choices[0].message.content == expected and served.lengths == [1] * 20
    (file,) = tmp_path.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    logging.getLogger("hf_kvattn").addHandler(caplog.handler)
    try:
        with answering(folder, prefixes=PrefixStore(tmp_path)) as served:
            assert served.ask(*question).choices[0].message.content == expected and served.prompts == [length]
    finally:
        logging.getLogger("hf_kvattn").removeHandler(caplog.handler)
    lines = {record.getMessage() for record in caplog.records if record.name == "hf_kvattn"}  # two handlers may have it
    assert len(lines) == 1 and str(file) in lines.pop()


def test_the_command_serves(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_kvattn", "serve", str(folder), "--dtype", "float32", "--cache", "int8"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prefix-folder", str(tmp_path / "prefixes")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout.readline() == f"{folder} answers at http://127.0.0.1:{port}/v1\n"
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=8)
        answer = client.chat.completions.create(model=str(folder), messages=[SYSTEM], max_tokens=10)
        assert answer.usage.completion_tokens == 10 and len(list((tmp_path / "prefixes").iterdir())) == 2
    finally:
        process.terminate()
        process.wait(30)


def test_what_cannot_be_served_is_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "load_model", lambda *args: pytest.fail("the model was loaded"))

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert commands.main(["serve", str(folder), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert refused("--continuous-batching", "--cache", "int4").endswith(
        "--continuous-batching keeps pages of its own, and takes no --cache"
    )
    assert "takes no --prefix-limit-gib" in refused("--continuous-batching", "--prefix-limit-gib", "1")
    assert "is no folder" in refused("--prefix-folder", str(tmp_path / "no" / "folder"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Address already in use" in refused("--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert refused().endswith('serve needs more packages: pip install "hf_kvattn[serve]"')
    monkeypatch.undo()
    model, tokenizer = inputs.load_model(str(folder), torch.float32)
    with pytest.raises(ValueError, match="is not enabled"):
        build_app(model, tokenizer, "tiny")
    hf_kvattn.enable(model, cache="int4")
    with pytest.raises(ValueError, match="continuous_batching=True keeps pages of its own"):
        build_app(model, tokenizer, "tiny", PrefixStore(None), continuous_batching=True)
    with pytest.raises(ValueError, match="makes no such cache"):
        build_app(hf_kvattn.enable(model), tokenizer, "tiny", PrefixStore(None))
