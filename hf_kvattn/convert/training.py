"""A short training loop with accelerate: on the next tokens of a text, or on what a teacher says of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

WARMUP = 0.05  # share of the steps in which the learning rate rises
MAX_GRADIENT_NORM = 1.0


def _loss(model: PreTrainedModel, ids: torch.Tensor, teacher: PreTrainedModel | None) -> torch.Tensor:
    """Nats a token: cross entropy with the text, or KL(teacher || model)."""
    logits = model(ids, use_cache=False).logits.float()
    if teacher is None:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        reference = teacher(ids, use_cache=False).logits.float().log_softmax(-1)
    return F.kl_div(
        logits.log_softmax(-1).flatten(0, 1), reference.flatten(0, 1), reduction="batchmean", log_target=True
    )


def train(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    teacher: PreTrainedModel | None = None,
    progress: bool = False,
) -> list[float]:
    """Train all weights of the model in place with AdamW; the loss of each step, in nats a token.

    With a teacher the loss is KL(teacher || model): distillation, which needs no more than a little text.

    Args:
        model: in float32; bfloat16 would round most updates away.
        windows: token ids, (windows, tokens); batches are drawn from them, the same ones at every call.
        steps: optimizer steps; the learning rate rises in the first 5% and falls to 0 along a cosine.
        learning_rate: at its highest.
        batch_size: windows a step.
        teacher: the model to imitate, of the same vocabulary.
        progress: show a bar on stderr.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"training needs a model in float32, not {model.dtype}")
    if not len(windows) or steps < 1:
        raise ValueError(f"nothing to train: {len(windows)} windows of text, {steps=}")
    from accelerate import Accelerator  # needed here alone

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    prepared, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    prepared.train()
    with tqdm(range(steps), desc="training", unit="step", disable=not progress) as bar:
        for _ in bar:
            chosen = torch.randint(len(windows), (batch_size,), generator=generator)
            loss = _loss(prepared, windows[chosen].to(model.device), teacher)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses
