"""Screen and rescore: an exact top-k of float32 scores at the price of a half-precision product.

The scores of a half-precision copy ŵ of the encoder name K > k candidates; those are scored again
in float32, and the k best of them are the answer if no other latent can be better:

    k-th rescored  >  K-th screened + ε,     ε = ‖x‖·max‖w − ŵ‖ + ‖x − x̂‖·max‖ŵ‖ + 2γ·‖x‖·max‖w‖

(Cauchy–Schwarz on both roundings; γ = d·2⁻²⁴ bounds float32 accumulation.) Tokens without that
certificate are encoded in full, so the result is exact either way. KERNELS.md section 4: 96
candidates certify every row of a synthetic dictionary at k 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.decode import gather_dot
from saert.kernels.select import topk_rows

_EXTRA = 64  # candidates beyond k


class Screen(NamedTuple):
    """A half-precision copy of an encoder, to be passed to `encode_topk`; make it with `screen`.

    Attributes:
        weights: half precision [num_latents, d_in].
        bounds: float64 [3], max‖w − ŵ‖, max‖ŵ‖ and max‖w‖ over latents.
    """

    weights: Tensor
    bounds: Tensor


def screen(W_enc: Tensor, dtype: torch.dtype = torch.bfloat16) -> Screen:
    """A Screen for W_enc [num_latents, d_in]. It has to be made again when the weights change."""
    with torch.no_grad():
        rounded = W_enc.to(dtype)
        bounds = [
            torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64).amax()
            for part in (W_enc - rounded.to(W_enc.dtype), rounded, W_enc)
        ]
        return Screen(rounded, torch.stack(bounds))


def screened_topk(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor | None,
    k: int,
    weights: Tensor,
    bounds: Tensor,
    full: Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, values, nan) as `full(x, W_enc, bias, k)` gives them, by screening.

    x [T, d_in] and W_enc in float32, centred; `full` also finds the candidates. Waits for the
    device, to see which tokens lack the certificate.
    """
    wanted = k + _EXTRA
    if wanted >= W_enc.shape[0]:  # candidates would be everything
        return full(x, W_enc, bias, k)
    if x.device.type == "cpu":
        candidates, floor = _half_candidates(x, weights, bias, wanted)
    else:
        candidates, screened, _ = full(x, weights, bias, wanted)
        floor = screened[:, -1]
    candidates = candidates.sort(dim=-1).values  # so that the earliest of equals is the lowest
    rescored = gather_dot(x, candidates, W_enc)
    rescored = rescored if bias is None else rescored + bias[candidates]
    # an unused candidate slot repeats latent 0, which must not be selected twice
    again = F.pad(candidates[:, 1:] == candidates[:, :-1], (1, 0))
    best, chosen = topk_rows(rescored.masked_fill(again, -torch.inf), k)
    indices = candidates.gather(1, chosen)

    exact = x.double()  # the squares of small numbers vanish in float32
    length, lost = exact.norm(dim=-1), (exact - x.to(weights.dtype).double()).norm(dim=-1)
    d = W_enc.shape[1]
    margin = length * (bounds[0] + 2 * d * 2.0**-24 * bounds[2]) + lost * bounds[1] + d * 2.0**-148
    if bias is not None:  # adding it rounds both scores
        margin = margin + 2.0**-22 * (floor.abs() + best[:, -1].abs() + bias.abs().amax())
    certain = best[:, -1] > floor + margin  # False for NaN
    used = best > 0
    indices, values = indices.where(used, 0), best.where(used, 0)
    nan = torch.zeros_like(certain)
    rest = (~certain).nonzero().squeeze(-1)
    if len(rest):
        indices[rest], values[rest], nan[rest] = full(x[rest], W_enc, bias, k)
    return indices, values, nan


def _half_candidates(
    x: Tensor, weights: Tensor, bias: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor]:
    """Candidates and an upper bound of everyone else's screened score, on a CPU, whose
    half-precision product is rounded to half precision again (2⁻⁷ for bfloat16)."""
    rounding = torch.finfo(weights.dtype).eps
    found, floors = [], []
    for part in x.split(dispatch.tokens_per_chunk(len(weights), torch.float32)):
        scores = F.linear(part.to(weights.dtype), weights).float()
        scores = scores if bias is None else scores + bias
        best, candidates = topk_rows(scores, wanted)
        slack = rounding * (best[:, -1].abs() + (0 if bias is None else bias.abs().amax()))
        found.append(candidates)
        floors.append(best[:, -1] + 2 * slack)
    return torch.cat(found), torch.cat(floors)
