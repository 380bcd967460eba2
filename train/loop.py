"""Train TopK SAEs, all on one stream of activations.

Initialisation, step order and optimiser follow Gao et al. 2024 (ALGORITHMS.md 1.3 to 1.5): b_dec at
the geometric median, W_enc = W_dec, decoder directions of unit norm, Adam with a tiny eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from saert.activations import TopK
from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.train.activations import ActivationStream
from saert.train.config import SAEConfig
from saert.train.data import Rows
from saert.train.language_model import trapezoid
from saert.train.objectives.topk import topk_loss


class Training:
    """One SAE, its optimiser, and how many tokens ago each latent fired."""

    def __init__(self, sae: SAE, config: SAEConfig) -> None:
        self.sae = sae.requires_grad_(True)
        self.config = config
        self.rate = config.lr * math.sqrt(2**14 / sae.num_latents)
        self.optimiser = torch.optim.Adam(
            sae.parameters(), lr=self.rate, betas=(0.9, 0.999), eps=6.25e-10, fused=True
        )
        self.since = torch.zeros(sae.num_latents, dtype=torch.int64)

    def step(self, x: Tensor, target: Tensor, factor: float) -> dict[str, float]:
        """One update at `factor` times the full rate. x [tokens, d_in], target [tokens, d_out]."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * factor
        loss = topk_loss(
            self.sae, x, target, self.dead, self.config.k_aux, self.config.aux_coefficient
        )
        self.optimiser.zero_grad()
        loss.total.backward()
        remove_parallel_gradient(self.sae)
        self.optimiser.step()
        normalise_decoder(self.sae)
        self.since = (self.since + len(x)).masked_fill(loss.fired, 0)
        return {
            "fvu": loss.fvu.item(),
            "aux": loss.aux.item(),
            "l0": loss.l0.item(),
            "dead": self.dead.float().mean().item(),
        }

    @property
    def dead(self) -> Tensor:
        """bool [num_latents]: silent for longer than `dead_tokens`."""
        return torch.gt(self.since, self.config.dead_tokens)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "since": self.since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.since = state["since"]


@torch.no_grad()
def remove_parallel_gradient(sae: SAE) -> None:
    """Project each decoder direction's gradient off the direction: its length is not free."""
    gradient = sae.W_dec.grad
    assert gradient is not None
    gradient -= (gradient * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec


@torch.no_grad()
def normalise_decoder(sae: SAE) -> None:
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))


def geometric_median(x: Tensor, steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point of least summed distance to the rows of x `[tokens, d]` (Weiszfeld)."""
    guess = x.mean(0)
    for _ in range(steps):
        # A row at the guess has distance zero: its weight must stay finite.
        weights = (x - guess).norm(dim=-1).clamp_min(1e-9).reciprocal()
        moved: Tensor = (weights[:, None] * x).sum(0) / weights.sum()
        if (moved - guess).norm() <= tolerance * guess.norm():
            return moved
        guess = moved
    return guess


@torch.no_grad()
def new_sae(
    hookpoint: Hookpoint, target: Hookpoint | None, x: Tensor, y: Tensor, config: SAEConfig
) -> SAE:
    """An SAE initialised from a sample: x `[tokens, d_in]` read, y `[tokens, d_out]` written.

    b_enc starts at −W_enc · (median of x): the encoder sees x − b_dec, as in Gao et al., while
    b_dec costs no backward pass through the encoder. Rescaling W_enc keeps the two proportional.
    """
    generator = torch.Generator().manual_seed(config.seed)
    num_latents, k = config.num_latents, config.k
    if target is not None:
        num_latents, k = config.transcoder_latents, config.transcoder_k
    W_enc = torch.randn(num_latents, x.shape[1], generator=generator)
    W_enc /= W_enc.norm(dim=-1, keepdim=True)
    centre = geometric_median(x)
    if target is None:
        W_dec, b_dec = W_enc.clone(), centre
    else:
        # Equal spread of the scores gives each latent its turn among the k largest, and W_dec
        # starts where the target goes when x goes along W_enc: a latent that never wins, or writes
        # at random and is switched off by the first gradients, does not come back.
        W_enc /= ((x - centre) @ W_enc.T).std(0)[:, None]
        b_dec = geometric_median(y)
        W_dec = W_enc @ ((x - centre).T @ (y - b_dec))
        W_dec /= W_dec.norm(dim=-1, keepdim=True)
    sae = SAE.from_weights(
        W_enc,
        W_dec,
        -W_enc @ centre,
        b_dec,
        activation=TopK(k),
        hookpoint=hookpoint,
        target_hookpoint=target,
        subtract_b_dec=False,
    )
    written = (sae(x) - b_dec).norm(dim=-1).mean()
    scale = (y - b_dec).norm(dim=-1).mean() / written  # as long as what it should write
    sae.W_enc.mul_(scale)
    assert sae.b_enc is not None
    sae.b_enc.mul_(scale)
    return sae


def train_saes(
    model: Any,
    documents: Sequence[Sequence[int]],
    hookpoints: Sequence[tuple[Hookpoint, Hookpoint | None]],
    config: SAEConfig,
    context: int,
    checkpoint: Path | None = None,
    *,
    stop: int | None = None,
    every: int = 200,
    progress: bool = True,
    report: Callable[[int, dict[str, dict[str, float]]], None] | None = None,
) -> list[SAE]:
    """Train one SAE per (hookpoint, target hookpoint or None), from `checkpoint` if it exists."""
    rows = Rows(documents, context, config.buffer_tokens // context, config.seed)
    sites = list(dict.fromkeys(h for pair in hookpoints for h in pair if h is not None))
    stream = ActivationStream(model, rows, sites, config.batch_tokens, config.seed)
    sample = stream[0]
    trainings = [
        Training(new_sae(h, target, sample[h], sample[target or h], config), config)
        for h, target in hookpoints
    ]
    done = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for training, saved in zip(trainings, state["trainings"], strict=True):
            training.load_state_dict(saved)
        done = state["step"]

    steps = config.tokens // config.batch_tokens
    last = steps if stop is None else min(stop, steps)
    bar = tqdm(
        total=steps * config.batch_tokens,
        initial=done * config.batch_tokens,
        desc="SAEs",
        unit="tok",
        unit_scale=True,
        mininterval=2,
        disable=not progress,
    )
    for step in range(done, last):
        factor = trapezoid(step, steps, round(config.warmup * steps), config.decay)
        batch = stream[step]
        logs = {
            str(h): training.step(batch[h], batch[target or h], factor)
            for (h, target), training in zip(hookpoints, trainings, strict=True)
        }
        bar.update(config.batch_tokens)
        if step % 10 == 0:
            bar.set_postfix({h: f"{log['fvu']:.3f}/{log['dead']:.0%}" for h, log in logs.items()})
            if report is not None:
                report(step, logs)
        if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == last):
            state = {"step": step + 1, "trainings": [t.state_dict() for t in trainings]}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
    bar.close()
    return [training.sae.requires_grad_(False) for training in trainings]
