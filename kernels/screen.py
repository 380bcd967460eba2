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
        bounds: float32 [3], max‖w − ŵ‖, max‖ŵ‖ and max‖w‖ over latents.
    """

    weights: Tensor
    bounds: Tensor


def screen(W_enc: Tensor, dtype: torch.dtype = torch.bfloat16) -> Screen:
    """A Screen for W_enc [num_latents, d_in]. It has to be made again when the weights change."""
    with torch.no_grad():
        rounded = W_enc.to(dtype)
        away = (W_enc - rounded.to(W_enc.dtype)).norm(dim=-1).amax()
        bounds = torch.stack([away, rounded.float().norm(dim=-1).amax(), W_enc.norm(dim=-1).amax()])
        return Screen(rounded, bounds)


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
    if not len(x):
        return full(x, W_enc, bias, k)
    wanted = min(k + _EXTRA, W_enc.shape[0])
    if x.device.type == "cpu":
        candidates, floor, nan = _half_candidates(x, weights, bias, wanted)
    else:
        candidates, screened, nan = full(x, weights, bias, wanted)
        floor = screened[:, -1]
    candidates = candidates.sort(dim=-1).values  # so that the earliest of equals is the lowest
    rescored = gather_dot(x, candidates, W_enc)
    rescored = rescored if bias is None else rescored + bias[candidates]
    # an unused candidate slot repeats latent 0, which must not be selected twice
    again = F.pad(candidates[:, 1:] == candidates[:, :-1], (1, 0))
    best, chosen = topk_rows(rescored.masked_fill(again, -torch.inf), k)
    indices = candidates.gather(1, chosen)

    length, lost = x.norm(dim=-1), (x - x.to(weights.dtype).float()).norm(dim=-1)
    gamma = W_enc.shape[1] * 2.0**-24
    margin = length * (bounds[0] + 2 * gamma * bounds[2]) + lost * bounds[1]
    certain = best[:, -1] > floor + margin
    if wanted == W_enc.shape[0]:
        certain |= True  # every latent was a candidate
    used = best > 0
    indices, values = indices.where(used, 0), best.where(used, 0)
    open_rows = (~certain & ~nan).nonzero().squeeze(-1)
    if len(open_rows):
        indices[open_rows], values[open_rows], nan[open_rows] = full(x[open_rows], W_enc, bias, k)
    return indices, values, nan


def _half_candidates(
    x: Tensor, weights: Tensor, bias: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates, an upper bound of everyone else's screened score, and the NaN flags, on a CPU,
    whose half-precision product is rounded to half precision again (2⁻⁷ for bfloat16)."""
    rounding = torch.finfo(weights.dtype).eps
    found, floors, nans = [], [], []
    for part in x.split(dispatch.tokens_per_chunk(len(weights), torch.float32)):
        scores = F.linear(part.to(weights.dtype), weights).float()
        scores = scores if bias is None else scores + bias
        best, candidates = topk_rows(scores, wanted)
        slack = rounding * (best[:, -1].abs() + (0 if bias is None else bias.abs().amax()))
        found.append(candidates)
        floors.append(best[:, -1] + 2 * slack)
        nans.append(best[:, 0].isnan())
    return torch.cat(found), torch.cat(floors), torch.cat(nans)
