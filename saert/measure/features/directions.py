"""What a latent's decoder direction says by itself: logits it moves, directions it lies near.

    lens(d) = W_U (g ∘ (d - mean(d)))          no mean where the final norm is an RMS norm

The logit lens of a direction, through the final norm with its scale frozen (g: the norm's weight),
up to that positive scale and without biases: the direct effect on the logits, as in nostalgebraist
(2020) with W_U as TransformerLens folds it. It is defined for SAEs that write into the residual
stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saert.architecture import blocks, unwrap
from saert.hookpoint import Hookpoint, HookpointError
from saert.hooks import device_of

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
WORK = 2**23  # elements of a block of logits or of cosines
BINS = 50


class Unembedding(NamedTuple):
    """Logits of directions: `lens(d)` as above."""

    weight: Tensor  # float32 [vocabulary, d_model]
    gain: Tensor  # float32 [d_model]
    centre: bool

    def lens(self, directions: Tensor) -> Tensor:
        """float [n, d_model] -> float32 [n, vocabulary]."""
        d = directions.to(self.weight.device, torch.float32)
        d = d - d.mean(-1, keepdim=True) if self.centre else d
        return (d * self.gain) @ self.weight.T


def unembedding(model: Any, write: Hookpoint, d_out: int) -> Unembedding | str:
    """How a direction written at a hookpoint reaches the logits; or why that is not defined."""
    if write.path is None and write.site not in STREAM:
        return f"{write} is not in the residual stream"
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2:
        return f"{type(model).__name__} has no unembedding matrix"
    if weight.is_meta:
        return "the unembedding is offloaded"
    if weight.shape[1] != d_out:
        return f"the SAE writes width {d_out}, the unembedding reads {weight.shape[1]}"
    found = _final_norm(model, head)
    if isinstance(found, str):
        return found
    gain, centre = found
    weight = weight.detach().float()
    return Unembedding(weight, gain.to(weight.device), centre)


@torch.no_grad()
def _final_norm(model: Any, head: nn.Module) -> tuple[Tensor, bool] | str:
    """Weight of the module between the last block and the unembedding, and whether it centres.

    Found by running one token and looking which module made what the unembedding reads.
    """
    made: list[tuple[nn.Module, Tensor]] = []  # kept, so that no address is used twice
    read: list[Tensor] = []
    inner = unwrap(model)[1]
    layers: list[nn.Module] = []
    with suppress(HookpointError):
        layers = list(blocks(inner)[1])
    inside = {id(module) for layer in layers for module in layer.modules()}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            made.append((module, first))

    def keep(module: nn.Module, args: Any) -> None:
        read.append(args[0])

    watched = [m for m in inner.modules() if id(m) not in inside and m is not head] + layers[-1:]
    handles = [module.register_forward_hook(note) for module in watched]
    handles.append(head.register_forward_pre_hook(keep))
    try:
        padding = getattr(model.config.get_text_config(), "pad_token_id", None)
        token = torch.tensor([[int(padding == 0)]], device=device_of(model))
        model(token, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        return "the model did not call its unembedding"
    width = read[0].shape[-1]
    maker = next((m for m, out in made if out.data_ptr() == read[0].data_ptr()), None)
    if maker is None:
        return "no module makes what the unembedding reads"
    if any(maker is layer for layer in layers):
        return torch.ones(width), False  # no norm at the end
    return _affine_norm(maker, width) or (
        f"{type(maker).__name__} before the unembedding is neither a layer norm nor an RMS norm"
    )


def _affine_norm(norm: nn.Module, width: int) -> tuple[Tensor, bool] | None:
    """(weight, centres) of a norm, read off what it does, and checked on another input."""
    norm = copy.deepcopy(norm).float()
    device = device_of(norm)
    x = torch.ones(width, device=device)  # mean 0 and nowhere 0; ±1 but for odd widths
    x[1::2] = -1
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0])
    x = 100 * x  # so that the norm's epsilon is nothing
    rms = x.square().mean().sqrt()
    gain = (norm(x[None])[0] - norm(-x[None])[0]) / (2 * x / rms)
    bias = (norm(x[None])[0] + norm(-x[None])[0]) / 2
    y = x.roll(1) + 30 * torch.arange(width, device=device) / width + 50
    for centre in (True, False):
        z = y - y.mean() if centre else y
        expected = gain * z / z.square().mean().sqrt() + bias
        if torch.allclose(norm(y[None])[0], expected, rtol=1e-3, atol=1e-3):
            return gain, centre
    return None


@torch.no_grad()
def logit_lens(
    W_dec: Tensor, through: Unembedding, top: int, at: tuple[int, int]
) -> dict[str, Tensor]:
    """For latents at[0] to at[1] - 1: the `top` tokens that each promotes and suppresses, with
    their lens logits, and a histogram of all of its logits.

    Returns promoted, suppressed: int32 [n, top]; promoted_logits, suppressed_logits: float32;
    logit_heights: int32 [n, 50] and logit_span: float32 [n, 2], between which the bins lie.
    """
    vocabulary = len(through.weight)
    top = min(top, vocabulary)
    parts: dict[str, list[Tensor]] = {}
    for first, last in _parts(*at, max(1, WORK // vocabulary)):
        logits = through.lens(W_dec[first:last])
        best, worst = logits.topk(top), logits.topk(top, largest=False)
        low, high = logits.amin(-1), logits.amax(-1)
        scale = BINS / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        bins = ((logits - low[:, None]) * scale[:, None]).long().clamp(0, BINS - 1)
        heights = torch.zeros(len(logits), BINS, dtype=torch.int64, device=logits.device)
        heights.scatter_add_(1, bins, torch.ones_like(bins))
        for name, value in {
            "promoted": best.indices.int(), "promoted_logits": best.values,
            "suppressed": worst.indices.int(), "suppressed_logits": worst.values,
            "logit_heights": heights.int(), "logit_span": torch.stack([low, high], -1),
        }.items():  # fmt: skip
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


@torch.no_grad()
def neighbours(W_dec: Tensor, top: int, at: tuple[int, int]) -> dict[str, Tensor]:
    """For latents at[0] to at[1] - 1: the other latents whose decoder directions are nearest.

    Returns neighbours: int32 [n, top], nearest first; cosines: float32 [n, top].
    """
    unit = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    top = min(top, len(unit) - 1)
    ids, cosines = [], []
    for first, last in _parts(*at, max(1, WORK // len(unit))):
        near = unit[first:last] @ unit.T
        near[torch.arange(last - first), torch.arange(first, last)] = -torch.inf
        best = near.topk(top)
        ids.append(best.indices.int().cpu())
        cosines.append(best.values.cpu())
    return {"neighbours": torch.cat(ids), "cosines": torch.cat(cosines)}


def _parts(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, size):
        yield start, min(start + size, last)
