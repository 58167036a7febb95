"""transformers' own OpenAI-compatible server, around one enabled model. It needs `pip install "hf_kvattn[serve]"`."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    CBGenerateManager,
    GenerateManager,
    GenerationState,
    Modality,
    split_model_id,
)

from hf_kvattn.integrations.prefixes import PrefixStore, context_limit, fresh_cache
from hf_kvattn.plugin import is_enabled


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prefixes: PrefixStore | None = None,
    continuous_batching: bool = False,
) -> FastAPI:
    """The app that serves `model`, for uvicorn or another ASGI server.

    Requests run one after the other in `model.generate()`, on a thread of their own. `app.state.generation.shutdown()`
    ends what runs beside the server.

    Args:
        model: an enabled model; with `prefixes`, enabled with a cache. Its `generate` goes through `prefixes` from
            here on.
        tokenizer: its tokenizer; with a chat template, for chats.
        name: what clients call the model.
        prefixes: where caches are kept from one request to the next; None computes every prompt anew.
        continuous_batching: whether requests run together, in `model.init_continuous_batching()`, with pages that
            transformers keeps.

    Raises:
        ValueError: a model that is not enabled, or that has no cache for `prefixes`, or `prefixes` together with
            `continuous_batching`.
    """
    if not is_enabled(model):
        raise ValueError(f"{type(model).__name__} is not enabled: call hf_kvattn.enable(model, cache='int4')")
    if prefixes is not None and continuous_batching:
        raise ValueError(f"{continuous_batching=} keeps pages of its own: prefixes must be None")
    limit = context_limit(model)
    if prefixes is not None:
        fresh_cache(model)  # its refusal
        model.generate = functools.partial(prefixes.generate, model)  # type: ignore[assignment]  # as enable() does
    state = _State(continuous_batching, limit)
    manager = _OneModel(name, model, tokenizer)
    handlers: dict[str, Any] = {
        "chat_handler": ChatCompletionHandler(manager, state),
        "completion_handler": CompletionHandler(manager, state),
        "response_handler": ResponseHandler(manager, state),
        "transcription_handler": TranscriptionHandler(manager, state),
    }
    if importlib.util.find_spec("transformers.cli.serving.systemone"):  # in newer versions
        from transformers.cli.serving.systemone import SystemOneHandler

        handlers["systemone_handler"] = SystemOneHandler(manager, state)
    app = build_server(manager, generation_state=state, **handlers)
    app.add_exception_handler(ValueError, _refuse)
    app.state.generation = state
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """A request that cannot be served is answered as OpenAI's API answers it."""
    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


class _OneModel(ModelManager):
    """Has one model, which was loaded before and stays."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model_timeout=-1)
        self.force_model = name  # set later than there: it would be loaded
        self._id, self._pair = self.process_model_name(split_model_id(name)[0]), (model, tokenizer)
        self._listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "hf_kvattn"}

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> Any:
        if model_id_and_revision != self._id:
            raise ValueError(f"this server has {self.force_model!r} alone, got {model_id_and_revision!r}")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": self._id, "cached": True})
        return self._pair

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]  # static there
        return [self._listed]

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.LLM


class _Fitting:
    """Makes a request fit into the model's context, or refuses it, before anything is sent to the client."""

    limit: int | None = None

    def _fit(self, inputs: Any, gen_config: Any) -> None:
        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        if self.limit is None:
            return
        if length >= self.limit:
            raise ValueError(f"the prompt has {length} tokens, and prompt and answer may have {self.limit}")
        if gen_config.max_new_tokens is not None:
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, self.limit - length)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args, **kwargs) -> Any:
        self._fit(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)  # type: ignore[misc]

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args, **kwargs
    ) -> Any:
        self._fit(inputs, gen_config)
        return await super().generate_non_streaming(  # type: ignore[misc]
            model, processor, inputs, gen_config, *args, **kwargs
        )


class _Sequential(_Fitting, GenerateManager):
    pass


class _Batched(_Fitting, CBGenerateManager):
    pass


class _State(GenerationState):
    def __init__(self, continuous_batching: bool, limit: int | None):
        super().__init__(continuous_batching=continuous_batching)
        self._sequential, self._batched = _Sequential(), _Batched()
        self._sequential.limit = self._batched.limit = limit

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self._batched if use_cb else self._sequential

    def is_cb_alive(self) -> bool:
        return self._batched.is_alive()

    def shutdown(self) -> None:
        self._batched.stop()
