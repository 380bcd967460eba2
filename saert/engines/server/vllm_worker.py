"""What the server adds to vLLM's workers, beside `saert.engines.vllm.worker.Worker`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Serving:
    """A `worker_extension_cls`."""

    def saert_serve(self: Any, never: list[int]) -> None:
        """Prepare a worker for the server's requests, of which none draws the tokens `never`."""
        runner = self.model_runner
        if never:
            bar(runner, never)
        if torch.device(runner.device).type == "cpu":
            spare_seeds(runner)


def bar(runner: Any, tokens: list[int]) -> None:
    """Take tokens out of the logits of every request from now on.

    vLLM's own way, a `logit_bias` in each request, leaves them among the log-probabilities.
    """
    model = runner.get_model()
    compute = model.compute_logits
    never = torch.tensor(tokens, device=runner.device)

    def compute_logits(*args: Any, **kwargs: Any) -> Tensor | None:
        logits: Tensor | None = compute(*args, **kwargs)  # some processes have none
        return None if logits is None else logits.index_fill(-1, never, -torch.inf)

    model.compute_logits = compute_logits


def spare_seeds(runner: Any) -> None:
    """Draw nothing from a request's seed before its prompt is read to the end.

    A pass that reads part of a prompt draws a token for nothing, and vLLM 0.32 then takes the draw
    back by `Generator.set_offset`, which CPU generators do not have: the engine dies of it.
    """
    sample = runner.sample_tokens

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        unread = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        aside = {i: batch.generators.pop(i) for i in unread if i in batch.generators}
        try:
            return sample(*args, **kwargs)
        finally:
            batch.generators.update(aside)

    runner.sample_tokens = sample_tokens
