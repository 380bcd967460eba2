"""Text that a language model writes by itself: what there is to measure on without any data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saert.hooks import device_of


@torch.no_grad()
def own_text(model: Any, start: int, rows: int, context: int, batch: int = 32) -> Tensor:
    """int64 [rows, context] on the CPU, sampled from the token `start`, the same every time.

    From the model's own distribution, without top-k or temperature, which would make easier text.
    """
    device = device_of(model)
    made = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for first in range(0, rows, batch):
            prompt = torch.full((min(batch, rows - first), 1), start, device=device)
            made.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=context - 1,
                    max_new_tokens=context - 1,
                    pad_token_id=start,
                ).cpu()
            )
    return torch.cat(made)
