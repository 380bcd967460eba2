"""One dictionary in training: its objective, its optimiser, and what has been silent for how long.

A step: loss, backward, gradients summed over replicas, the part along each decoder direction
removed, clipped, Adam, decoder directions back to unit norm, moving average (Gao et al. 2024;
ALGORITHMS.md 1.4. Their code renormalises before the update and so saves directions that are only
almost of unit norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saert.train.dictionary import REPLICATED, Dictionary
from saert.train.objectives.base import Batch, Loss, Objective, Step
from saert.train.schedule import trapezoid

DEAD_TOKENS = 10_000_000  # Gao et al. 2024

# of `default_rate`: where published rates are used as they are, and what no sweep exceeded (LOG.md)
PUBLISHED_WIDTH, PUBLISHED_STEPS, LARGEST_RATE = 768, 5000, 0.016


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam as Gao et al. 2024 use it."""

    lr: float | None = None  # at 16,384 latents, scaled by 1/√num_latents; None: `default_rate`
    betas: tuple[float, float] | None = None  # None: the objective's own
    eps: float = 6.25e-10  # tiny, because gradients are averaged over the batch
    warmup: float = 0.01  # the first part of the steps, in which the rate rises
    decay: float = 0.2  # the last part, in which it falls to zero
    clip: float | None = None  # of the gradient's norm over all parameters
    ema: float = 0.0  # of the parameters; 0: none. The paper's: 0.999
    dead_tokens: int | None = None  # a latent silent for longer is dead; None: DEAD_TOKENS, or a
    # twentieth of the run if that is less

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1 or not 0 <= self.warmup <= 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"optimiser: ema {self.ema} must be in [0, 1), warmup {self.warmup} and decay "
                f"{self.decay} in [0, 1]"
            )
        if any(v is not None and not 0 < v < math.inf for v in (self.lr, self.clip)):
            raise ValueError(f"optimiser: lr {self.lr} and clip {self.clip} must be positive")


class Training:
    """A dictionary, an objective and an optimiser; `step` moves them on by one batch."""

    def __init__(
        self,
        dictionary: Dictionary,
        objective: Objective,
        config: OptimiserConfig,
        steps: int,
        seed: int = 0,
    ) -> None:
        """`objective.prepare` has to have been called: it may add parameters."""
        self.dictionary, self.objective, self.config = dictionary, objective, config
        self.steps, self.seed = steps, seed
        if config.lr is None:
            self.rate = default_rate(objective.lr, dictionary.num_latents, dictionary.d_in, steps)
        else:
            self.rate = config.lr * math.sqrt(2**14 / dictionary.num_latents)
        self.optimiser = torch.optim.Adam(
            dictionary.parameters(),
            lr=self.rate,
            betas=config.betas or objective.betas,
            eps=config.eps,
            fused=True,
        )
        for p in dictionary.parameters():  # there from the start, so that a checkpoint can fill it
            self.optimiser.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        device = dictionary.W_enc.device
        self.since = torch.zeros(dictionary.local, dtype=torch.int64, device=device)
        self.average: dict[str, Tensor] = {}
        if config.ema:
            parameters = dictionary.named_parameters()
            self.average = {name: torch.zeros_like(p) for name, p in parameters}
        self.updates = 0

    @property
    def dead(self) -> Tensor:
        """bool [local]: silent for longer than `dead_tokens`."""
        limit = self.config.dead_tokens
        return torch.gt(self.since, DEAD_TOKENS if limit is None else limit)

    def step(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """One update by step `number`. Returns what to log, as scalars of the whole batch."""
        d, c = self.dictionary, self.config
        for group in self.optimiser.param_groups:
            warmup = round(c.warmup * self.steps)
            group["lr"] = self.rate * trapezoid(number, self.steps, warmup, c.decay)
        loss = self.objective.loss(d, batch, Step(number, self.steps, self.dead, self.seed))
        self.optimiser.zero_grad()
        loss.total.backward()
        self._sum_gradients()
        if self.objective.unit_decoder:
            remove_parallel_gradient(d)
        norm = clip_gradient(d, c.clip)
        self.optimiser.step()
        if self.objective.unit_decoder:
            normalise_decoder(d)
        self._move_average()
        fired = d.mesh.any_tokens(loss.fired)
        self.since = (self.since + batch.tokens).masked_fill(fired, 0)
        return self._log(loss, batch) | {"gradient_norm": norm}

    def _log(self, loss: Loss, batch: Batch) -> dict[str, Tensor]:
        """All scalars in one exchange each: over tokens, then over latents."""
        mesh = self.dictionary.mesh
        names = ["fvu", *loss.parts]
        shares = torch.stack(
            [loss.fvu.detach().double(), *(p.double() for p in loss.parts.values())]
        )
        found = dict(zip(names, mesh.sum_tokens(shares).unbind(), strict=True))
        counts = torch.stack([mesh.sum_tokens(loss.active).double(), self.dead.sum().double()])
        active, dead = mesh.sum_latents(counts).unbind()
        return found | {"l0": active / batch.tokens, "dead": dead / self.dictionary.num_latents}

    def _sum_gradients(self) -> None:
        """One sum over the replicas of all gradients: latency costs more than bytes."""
        mesh = self.dictionary.mesh
        for p in self.dictionary.parameters():
            if p.grad is None:  # fused Adam skips it, and a sharded sum would not match
                p.grad = torch.zeros_like(p)
        if mesh.replicas == 1:
            return
        gradients = [p.grad for p in self.dictionary.parameters() if p.grad is not None]
        flat = mesh.sum_tokens(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])
        for gradient, total in zip(gradients, parts, strict=True):
            gradient.copy_(total.view_as(gradient))

    @torch.no_grad()
    def _move_average(self) -> None:
        self.updates += 1
        for name, parameter in self.dictionary.named_parameters():
            if self.average:
                self.average[name].lerp_(parameter, 1 - self.config.ema)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """This shard's tensors as they are published: averaged over the run, if `ema` says so,
        with decoder directions of unit norm."""
        found = {name: t.clone() for name, t in self.dictionary.tensors().items()}
        if self.average and self.updates:
            unbiased = 1 - self.config.ema**self.updates
            found |= {name: t / unbiased for name, t in self.average.items()}
        if self.objective.unit_decoder:
            found["W_dec"] = unit(found["W_dec"])
        return found

    @torch.no_grad()
    def finish(self) -> None:
        """Training is over: from here on the dictionary holds `weights()`."""
        found = self.weights()
        for name, parameter in self.dictionary.named_parameters():
            parameter.copy_(found[name])
        self.average = {}

    def state_dict(self) -> dict[str, Tensor]:
        """This shard's tensors, to save or to be filled in place; `updates` is not among them."""
        state: dict[str, Tensor] = {"since": self.since, **self.dictionary.tensors()}
        state |= {f"average.{name}": t for name, t in self.average.items()}
        for name, parameter in self.dictionary.named_parameters():
            for moment, value in self.optimiser.state[parameter].items():
                state[f"{moment}.{name}"] = value
        return state


def default_rate(lr: float, num_latents: int, d_in: int, steps: int) -> float:
    """The learning rate where none is given.

        lr · √(16,384 / num_latents) · √(768 / d_in) · √max(1, 5,000 / steps),    at most 0.016

    The first factor is the rule of Gao et al. 2024. The others are ours, from sweeps on small
    models: published rates are for wide models and long runs, and leave a short run half trained.
    """
    short = max(1.0, PUBLISHED_STEPS / steps)
    return min(LARGEST_RATE, lr * math.sqrt(2**14 / num_latents * PUBLISHED_WIDTH / d_in * short))


@torch.no_grad()
def remove_parallel_gradient(d: Dictionary) -> None:
    """Project each decoder direction's gradient off the direction: its length is not free."""
    gradient = d.W_dec.grad
    assert gradient is not None
    along = torch.linalg.vecdot(gradient, d.W_dec).unsqueeze(-1)
    gradient.addcmul_(along, d.W_dec, value=-1)


@torch.no_grad()
def normalise_decoder(d: Dictionary) -> None:
    """Every decoder direction back to unit norm."""
    d.W_dec.div_(length(d.W_dec))


def unit(rows: Tensor) -> Tensor:
    """Rows of unit norm; a row of zeros stays zero."""
    return rows / length(rows)


def length(rows: Tensor) -> Tensor:
    """Norms [rows, 1], of a row of zeros the smallest number there is."""
    norm: Tensor = rows.norm(dim=-1, keepdim=True)
    return norm.clamp_min(torch.finfo(rows.dtype).tiny)


@torch.no_grad()
def clip_gradient(d: Dictionary, limit: float | None) -> Tensor:
    """Scale all gradients down to norm `limit`, if it is exceeded; the norm before.

    Exact over shards: their latents' squares are summed, and what all hold is counted once.
    """
    own = shared = d.b_dec.new_zeros((), dtype=torch.float64)
    for name, p in d.named_parameters():
        if p.grad is not None:
            # by rows: one float32 sum over millions is a thousandth off
            square = torch.linalg.vector_norm(p.grad, dim=-1).double().square().sum()
            own, shared = (own, shared + square) if name in REPLICATED else (own + square, shared)
    norm = (d.mesh.sum_latents(own) + shared).sqrt()
    if limit is not None:
        factor = (limit / norm.clamp_min(limit)).item()
        for p in d.parameters():
            if p.grad is not None and factor < 1:
                p.grad.mul_(factor)
    return norm
