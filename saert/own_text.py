"""Text that a language model writes by itself: what there is to measure on without any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saert.hooks import device_of


@torch.no_grad()
def own_text(
    model: Any,
    start: int,
    rows: int,
    context: int,
    batch: int = 32,
    told: Callable[[int, int], None] | None = None,
) -> Tensor:
    """int64 [rows, context] on the CPU, sampled from the token `start`, the same every time.

    Without top-k, top-p or temperature, which would make easier text. What else the model's
    generation_config says holds (a repetition penalty, say), and no row ends early: its
    end-of-text tokens are never drawn. Random numbers come from a generator of its own, so that
    other threads may draw theirs.
    `told` hears how many rows are written, and of how many.
    """
    device = device_of(model)
    drawn = torch.Generator(device).manual_seed(0)

    def race(ids: Tensor, scores: Tensor) -> Tensor:
        # the largest of p / Exponential(1) is a draw from p, and is how torch.multinomial draws
        p = scores.softmax(-1)
        return p / torch.empty_like(p).exponential_(1, generator=drawn)

    made = []
    for first in range(0, rows, batch):
        prompt = torch.full((min(batch, rows - first), 1), start, device=device)
        made.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                logits_processor=[race],
                temperature=1.0,
                top_k=50,
                top_p=1.0,
                min_new_tokens=context - 1,
                max_new_tokens=context - 1,
                max_length=None,  # the model's own would make transformers warn each time
                pad_token_id=start,
            ).cpu()
        )
        if told is not None:
            told(min(first + batch, rows), rows)
    return torch.cat(made)
