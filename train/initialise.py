"""Where a dictionary starts (Gao et al. 2024; ALGORITHMS.md 1.3), for any number of shards alike.

b_dec at the geometric median of the target, encoder and decoder rows the same random directions,
and the encoder scaled so that a reconstruction is about as long as what it reconstructs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saert.sae import SAE
from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives.base import Objective
from saert.train.training import unit
from saert.train.units import Units

DENSE = 4096  # tokens of the sample that dense activations are computed for
BLOCK = 1024  # rows drawn with one seed, so that a shard can draw its own rows alone


def random_directions(rows: slice, d: int, seed: int, device: torch.device | str) -> Tensor:
    """Unit vectors float32 [rows, d]; a row depends on its number and the seed only."""
    blocks = range(rows.start // BLOCK, -(-rows.stop // BLOCK))
    drawn = []
    for block in blocks:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        drawn.append(torch.randn(BLOCK, d, generator=generator))
    first = blocks.start * BLOCK
    return unit(torch.cat(drawn)[rows.start - first : rows.stop - first]).to(device)


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
def new_dictionary(
    x: Tensor,
    y: Tensor,
    num_latents: int,
    objective: Objective,
    mesh: Mesh,
    *,
    seed: int = 0,
    transcodes: bool = False,
    skip: bool = False,
    compute: torch.dtype | None = None,
) -> Dictionary:
    """A dictionary for x [tokens, d_in] -> y [tokens, d_out], a sample that is the same on all
    ranks, in the units of training; its dtype is the weights'.

    Raises ValueError if the shards do not divide the latents, or the objective asks for more
    latents a token than there are.
    """
    local = num_latents // mesh.shards
    if num_latents % mesh.shards:
        raise ValueError(f"{mesh.shards} shards do not divide {num_latents} latents")
    k = getattr(objective, "k", None)
    if k is not None and k > num_latents:
        raise ValueError(f"objective {objective.name}: k is {k}, but num_latents {num_latents}")
    rows = slice(mesh.shard * local, (mesh.shard + 1) * local)
    W_enc = random_directions(rows, x.shape[1], seed, x.device).to(x.dtype)
    centre, b_dec = geometric_median(x), geometric_median(y)
    if transcodes:
        # Equal spread of the scores gives each latent its turn among the k largest, and W_dec
        # starts where the target goes when x goes along W_enc: a latent that never wins, or writes
        # at random and is switched off by the first gradients, does not come back.
        centred = x - x.mean(0)
        spread = ((W_enc @ (centred.T @ centred)) * W_enc).sum(-1) / (len(x) - 1)
        W_enc /= spread.sqrt()[:, None]
        W_dec = unit(W_enc @ ((x - centre).T @ (y - b_dec)))
    else:
        W_dec = W_enc.clone()
    W_dec *= getattr(objective, "decoder_norm", 1.0)
    subtract = objective.subtract_b_dec and not transcodes
    # the encoder sees x − centre, one way or the other
    b_enc = torch.zeros_like(W_enc[:, 0]) if subtract else -W_enc @ centre
    W_skip = x.new_zeros(y.shape[1], x.shape[1]) if skip else None
    d = Dictionary(
        W_enc, W_dec, b_enc, b_dec, W_skip,
        num_latents=num_latents, mesh=mesh, subtract_b_dec=subtract, compute=compute,
    )  # fmt: skip
    scale = _length(d, x, y - b_dec, k) if k is not None else _least_squares(d, x, y - b_dec)
    d.W_enc.mul_(scale)
    d.b_enc.mul_(scale)
    return d


def _length(d: Dictionary, x: Tensor, wanted: Tensor, k: int) -> Tensor:
    """What makes the k largest latents' reconstruction as long as what it should write."""
    written = d.decode(d.topk(x, k), bias=False).norm(dim=-1).mean()
    scale: Tensor = wanted.norm(dim=-1).mean() / written.clamp_min(1e-12)
    return scale


def _least_squares(d: Dictionary, x: Tensor, wanted: Tensor) -> Tensor:
    """What makes the reconstruction by every positive latent, half of them at first, fit best.
    Of some of the sample: this is dense."""
    along, square = x.new_zeros(()), x.new_full((), 1e-12)
    for part, target in zip(x[:DENSE].split(256), wanted[:DENSE].split(256), strict=True):
        written = d.decode_dense(d.scores(part).relu(), bias=False)
        along, square = along + (written * target).sum(), square + written.square().sum()
    return (along / square).clamp_min(1e-3)


@torch.no_grad()
def start_from(d: Dictionary, sae: SAE, units: Units) -> None:
    """Give a dictionary the weights of a saved SAE, for fine-tuning. Thresholds and other numbers
    of an objective are for its `prepare` and `adopt`, which come next.

    Decoder norms ν move into the encoder: W_enc · ν and b_enc · ν with W_dec / ν write the same.
    Activations are then ν times what they were, so `adopt` multiplies thresholds and biases by the
    buffer `saved_norm` [num_latents] left here, on every rank for all latents. It is 1 where the
    SAE selects by decoder norm, by score · ν: what it compares is what it compared.

    Raises ValueError if the SAE has other shapes, or reads through another input transform.
    """
    found = [sae.num_latents, sae.d_in, sae.d_out]
    if found != [d.num_latents, d.d_in, d.d_out]:
        raise ValueError(
            f"init: the SAE has num_latents, d_in, d_out = {found}, this run "
            f"{[d.num_latents, d.d_in, d.d_out]}"
        )
    if sae.input_transform != units.transform or (sae.W_skip is None) != (d.W_skip is None):
        raise ValueError(
            f"init: the SAE has {sae.input_transform} and W_skip {sae.W_skip is not None}; this "
            f"run trains with {units.transform} and W_skip {d.W_skip is not None}"
        )
    stored: dict[str, Tensor] = {
        name: t.to(d.W_enc.dtype)  # a norm in bfloat16 would have two digits
        for name, t in sae.named_parameters()
        if name in ("W_enc", "W_dec", "b_enc")
    }
    whole = units.unfold(
        {
            "b_enc": d.b_enc.new_zeros(d.num_latents),
            **stored,
            "b_dec": torch.zeros_like(d.b_dec) if sae.b_dec is None else sae.b_dec,
            "W_skip": sae.W_skip,
        }
    )
    norm = whole["W_dec"].norm(dim=-1)  # objectives hold it at 1: let activations carry it instead
    whole["W_dec"] = unit(whole["W_dec"])
    whole["W_enc"], whole["b_enc"] = whole["W_enc"] * norm[:, None], whole["b_enc"] * norm
    for name in ("W_enc", "W_dec", "b_enc"):
        getattr(d, name).copy_(whole[name][d.latents])
    for name in ("b_dec", "W_skip"):
        if whole.get(name) is not None:
            getattr(d, name).copy_(whole[name])
    saved_norm = torch.ones_like(norm) if sae.select_by_decoder_norm else norm
    d.register_buffer("saved_norm", saved_norm, persistent=False)
    d.subtract_b_dec = sae.subtract_b_dec
