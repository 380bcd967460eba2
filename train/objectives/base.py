"""What an objective is, and the two terms that most of them share.

An objective is frozen data, its hyper-parameters, with one method for the loss. Losses are
*shares*: a process computes the part of the batch's loss that its own tokens cause, over global
denominators, so that gradients and logged numbers are sums over processes and equal those of one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from saert.activations import Activation, BatchTopK, Gated, TopK
from saert.measure.reports.reconstruction import ALIVE
from saert.train.dictionary import Code, Dictionary, narrow
from saert.train.mesh import Mesh

EQUAL = 1.005
"""Decoder norms within this factor count as equal: rounding to bfloat16 takes up to 1.004."""


@dataclass(frozen=True)
class Batch:
    """One step's tokens at one hookpoint, in the units of training.

    Attributes:
        x: [T, d_in], this replica's tokens; y: [T, d_out], what to reconstruct (x itself, unless
            the dictionary is a transcoder).
        tokens: of the whole batch, over all replicas; x[0] is its token number `first`.
        variance: Σ‖y − ȳ‖² over the whole batch.
        gradient: [T, d_out], ∇_y of the language model's loss, if the objective `wants` it: at the
            hookpoint where the dictionary writes, the target's for a transcoder.
        downstream: (reconstruction [T, d_out]) -> this replica's share of the batch's mean
            KL(model ‖ model with the reconstruction spliced in), differentiable, if it wants that.
    """

    x: Tensor
    y: Tensor
    tokens: int
    first: int
    variance: Tensor
    gradient: Tensor | None = None
    downstream: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mesh: Mesh, **more: Any) -> Batch:
        """A batch from this replica's tokens; every replica holds equally many."""
        first, tokens = mesh.replica * len(x), mesh.replicas * len(x)
        return cls(x, y, tokens, first, variance(y, tokens, mesh), **more)


@dataclass(frozen=True)
class Step:
    """When: step `number` of `steps` (from 0), the run's seed, and which of this shard's latents
    are `dead` (bool [local]: no activation above ALIVE for `dead_tokens` tokens)."""

    number: int
    steps: int
    dead: Tensor
    seed: int = 0

    @property
    def progress(self) -> float:
        """From 0 at the first step to almost 1 at the last."""
        return self.number / max(1, self.steps)

    def generator(self) -> torch.Generator:
        """The same random numbers for a step, however often the run was stopped before it."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)


@dataclass(frozen=True)
class Loss:
    """Attributes:
    total: this process's share of the loss; carries the gradient.
    fvu: this replica's share of the fraction of variance unexplained.
    fired: bool [local], the latents that some token of this replica activates above ALIVE.
    active: int64 scalar, the activations above 0 on this shard and replica, over all tokens.
    parts: other terms for the log, by name: shares of this replica, summed over the shards.
    """

    total: Tensor
    fvu: Tensor
    fired: Tensor
    active: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Base of the objectives: frozen dataclasses of hyper-parameters.

    Class attributes:
        name: what `--objective` calls it.
        normalise: the input transform it was published with (see `train/initialise.py`), for
            `normalise = "auto"`.
        unit_decoder: whether decoder directions keep unit norm, and lose the gradient along them.
        subtract_b_dec: whether an autoencoder encodes x − b_dec.
        decoder_norm: of a new decoder's directions; other than 1 only without `unit_decoder`.
        has_b_enc: whether the exported SAE has a b_enc; a gated one's biases are its activation's.
        wants: what a batch must carry besides activations: "gradient", "downstream".
        lr, betas: of Adam, where the configuration leaves them open; lr at 16,384 latents.
    """

    name: ClassVar[str]
    normalise: ClassVar[str] = "none"
    unit_decoder: ClassVar[bool] = True
    subtract_b_dec: ClassVar[bool] = True
    decoder_norm: ClassVar[float] = 1.0
    has_b_enc: ClassVar[bool] = True
    wants: ClassVar[str | None] = None
    lr: ClassVar[float] = 2e-4
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def prepare(self, d: Dictionary, batch: Batch) -> None:  # noqa: B027
        """Add this objective's parameters (`d.extra`) and numbers (`d.state`), from a first batch.

        Every rank has to make them the same, or its own latents' part of the same.
        """

    def adopt(self, d: Dictionary, activation: Activation) -> None:
        """After `start_from` and `prepare`: start from the saved SAE's activation, in the units of
        training. Its decoder's norms are not in it yet (`folded`).

        Raises ValueError where the SAE would become another one: if it is gated, or compares
        latents by plain scores although their decoder norms differ, and this objective ranks them.
        """
        if isinstance(activation, Gated):
            raise ValueError(f"init: a gated SAE can start gated training only, not {self.name}")
        if isinstance(activation, TopK | BatchTopK) and getattr(self, "k", None) is not None:
            norm = d.get_buffer("saved_norm")
            if norm.max() > EQUAL * norm.min():
                raise ValueError(
                    f"init: the SAE's {type(activation).__name__} compares plain scores, and its "
                    f"decoder norms are {norm.min():.3g} to {norm.max():.3g}; {self.name} ranks by "
                    "score times norm, and would select other latents. Start from an SAE with "
                    "equal norms, or, to rank by that from now on, save this one with "
                    "select_by_decoder_norm = True first"
                )

    @abstractmethod
    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        """The loss of one batch. May update `d.state`, equally on all ranks."""

    def calibrate(self, d: Dictionary, batch: Batch) -> None:  # noqa: B027
        """After training, on a large batch: what the exported activation needs and training did
        not estimate (Llama Scope's threshold). Updates `d.state`."""

    @abstractmethod
    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        """The inference activation, in the units of training, from `Dictionary.whole()`."""


def folded(d: Dictionary, saved: Tensor) -> Tensor:
    """Thresholds or biases of the SAE that `d` started from, a number or [num_latents], times its
    decoder's norms, which the scores of `d` carry: [num_latents], of all shards."""
    norm = d.get_buffer("saved_norm")
    return saved.to(norm) * norm


# -- shared terms --------------------------------------------------------------------------------


def variance(y: Tensor, tokens: int, mesh: Mesh) -> Tensor:
    """Σ‖y − ȳ‖² over the whole batch of `tokens`, y [T, d] being this replica's part.

    Never zero: a constant target has nothing to explain, and dividing by zero would give NaN.
    """
    mean = mesh.sum_tokens(y.sum(0)) / tokens
    total = mesh.sum_tokens((y - mean).square().sum())
    return total.clamp_min(torch.finfo(y.dtype).tiny)


def unexplained(y: Tensor, estimate: Tensor, scale: Tensor) -> Tensor:
    """This replica's share of the FVU, Σ‖y − estimate‖² / scale (ALGORITHMS.md 1.7)."""
    return (y - estimate).square().sum() / scale


def k_aux_for(d_in: int) -> int:
    """The power of two nearest to d_in / 2 in ratio (Gao et al. 2024, appendix A.2)."""
    return int(2 ** round(math.log2(max(2, d_in / 2))))


def aux_loss(
    d: Dictionary, batch: Batch, reconstruction: Tensor, among: Tensor, k_aux: int | None
) -> Tensor:
    """How badly the k_aux strongest of the latents `among` (bool [local]) explain the residual.

        FVU(ê, sg(y − ŷ)),     ê = Σ f_i W_dec[i] over the k_aux largest positive scores, no bias

    (Gao et al. 2024, AuxK; ALGORITHMS.md 1.5). The gradient reaches those latents' encoder rows.
    Exactly 0 if no latent qualifies; no latent means none on any shard.
    """
    latents = among.nonzero().squeeze(-1)
    if not d.mesh.any(len(latents) > 0):
        return batch.x.new_zeros(())
    k = k_aux or k_aux_for(d.d_in)
    residual = (batch.y - reconstruction).detach()
    code = narrow(d.best(batch.x, k, latents=latents), k, d.mesh)
    estimate = d.decode(code, bias=False)
    return unexplained(residual, estimate, variance(residual, batch.tokens, d.mesh))


def summarise(d: Dictionary, code: Code) -> tuple[Tensor, Tensor]:
    """`fired` and `active` of a Loss from a sparse code."""
    values = code.values.detach()
    fired = torch.zeros(d.local, dtype=torch.bool, device=values.device)
    fired[code.indices[values > ALIVE]] = True
    return fired, (values > 0).sum()


def summarise_dense(f: Tensor) -> tuple[Tensor, Tensor]:
    """`fired` and `active` of a Loss from dense activations [T, local]."""
    f = f.detach()
    return (f > ALIVE).any(0), (f > 0).sum()
