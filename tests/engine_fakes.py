"""What engines hand to hooks, in miniature: flat tokens, pairs with a residual, a model runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saert.activations import JumpReLU, TopK
from saert.sae import SAE

D, LATENTS = 12, 40


def sae(activation: Any = None, **options: Any) -> SAE:
    generator = torch.Generator().manual_seed(3)
    W_enc, W_dec = (torch.randn(LATENTS, D, generator=generator) / 3 for _ in range(2))
    b_enc, b_dec = torch.randn(LATENTS, generator=generator) / 9, torch.zeros(D)
    options = dict(hookpoint="layers.0", activation=activation or TopK(6)) | options
    return SAE.from_weights(W_enc, W_dec, b_enc, b_dec, **options)


def jump() -> SAE:
    return sae(JumpReLU(0.2))


class Block(nn.Module):
    """`kind`: "pair" returns (x, residual), "flat" x [T, d], "batch" x [1, T, d]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "pair":
            return self.linear(x), x
        return self.linear(x) + x


class Model(nn.Module):
    """One block, and what comes out of it as the stream."""

    def __init__(self, kind: str = "pair") -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(kind)])

    def forward(self, x: Tensor) -> Tensor:
        kind = self.layers[0].kind
        out = self.layers[0](x[None] if kind == "batch" else x)
        if kind == "pair":
            return out[0] + out[1]
        return out[0] if kind == "batch" else out


class Runner:
    """A V1 model runner as far as a `Station` looks at it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.query_start_loc = SimpleNamespace(np=np.zeros(16, np.int32))

    def get_model(self) -> nn.Module:
        return self.model

    def _model_forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(input_ids)

    def add(self, name: str, prompt: int, saert: Any = None) -> None:
        params = SimpleNamespace(extra_args=None if saert is None else {"saert": saert})
        self.requests[name] = SimpleNamespace(sampling_params=params, num_prompt_tokens=prompt)

    def step(self, **scheduled: tuple[Tensor, int]) -> dict[str, Tensor]:
        """A pass over {request: (x [T, d], position of its first token)}; padded by 3 tokens."""
        self.input_batch.req_ids = list(scheduled)
        lengths = [len(x) for x, _ in scheduled.values()]
        self.query_start_loc.np[: len(lengths) + 1] = np.cumsum([0, *lengths])
        padding = torch.full((3, D), torch.nan)
        x = torch.cat([*(x for x, _ in scheduled.values()), padding])
        positions = [torch.arange(first, first + len(x)) for x, first in scheduled.values()]
        out = self._model_forward(x, positions=torch.cat([*positions, torch.zeros(3).long()]))
        return dict(zip(scheduled, out[:-3].split(lengths), strict=True))
