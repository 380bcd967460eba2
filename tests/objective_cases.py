"""Planted data and small dictionaries for the tests of training objectives."""

import torch

from saert.sae import SAE
from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives.base import Batch, Objective, Step
from saert.train.training import OptimiserConfig, Training, unit

D_IN, FEATURES = 16, 32


def planted(tokens: int, seed: int = 0, active: float = 3.0, d_in: int = D_IN) -> torch.Tensor:
    """x [tokens, d_in]: sparse non-negative sums of FEATURES fixed directions, plus a bias."""
    directions = unit(torch.randn(FEATURES, d_in, generator=torch.Generator().manual_seed(99)))
    draw = torch.Generator().manual_seed(seed)
    on = torch.rand(tokens, FEATURES, generator=draw) < active / FEATURES
    strength = 0.5 + torch.rand(tokens, FEATURES, generator=draw)
    return (on * strength) @ directions + 0.3


def a_dictionary(
    num_latents: int = 48,
    d_in: int = D_IN,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **more,
) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)
    W = unit(torch.randn(num_latents, d_in, generator=draw, dtype=torch.float64)).to(dtype)
    zeros = torch.zeros(num_latents, dtype=dtype)
    return Dictionary(W, W.clone(), zeros, torch.full((d_in,), 0.3, dtype=dtype), **more)


def a_batch(x: torch.Tensor, **more) -> Batch:
    return Batch.of(x, x, Mesh(), **more)


def a_step(d: Dictionary, number: int = 0, steps: int = 100, dead=None) -> Step:
    none = torch.zeros(d.local, dtype=torch.bool)
    return Step(number, steps, none if dead is None else dead)


def exported(d: Dictionary, objective: Objective) -> SAE:
    """In the units of training, decoder norms as they are."""
    whole = d.whole()
    return SAE.from_weights(
        whole["W_enc"],
        whole["W_dec"],
        whole["b_enc"],
        whole["b_dec"],
        activation=objective.activation(whole),
        subtract_b_dec=d.subtract_b_dec,
    )


def trained(
    objective: Objective,
    steps: int = 300,
    tokens: int = 256,
    num_latents: int = 48,
    batch=lambda x: a_batch(x),
    **options,
) -> tuple[Training, list[dict[str, float]]]:
    """A dictionary trained on planted data with fresh batches, and its log."""
    options = {"lr": 3e-3 / (2**14 / num_latents) ** 0.5, "dead_tokens": 20 * tokens} | options
    d = a_dictionary(num_latents)
    objective.prepare(d, batch(planted(2048, seed=10**6)))
    training = Training(d, objective, OptimiserConfig(**options), steps)
    logs = []
    for number in range(steps):
        found = training.step(batch(planted(tokens, seed=number)), number)
        logs.append({name: value.item() for name, value in found.items()})
    return training, logs
