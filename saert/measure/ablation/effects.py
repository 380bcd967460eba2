"""How much, how sparsely and where a change moves a model's predictions.

For logits z before and z′ after a change, over T tokens (Gao et al. 2024, section 4.5;
ALGORITHMS.md 1.11), with p = softmax(z):

    δ = z′ − z,    v = δ − median over the vocabulary,    s = (‖v‖₁ / ‖v‖₂)² / (V·T)
    KL = log Σ p e^δ − Σ p δ = log1p Σ p (e^u − 1 − u),    u = δ − Σ p δ
    loss change = Σ p δ + KL − δ of the next token

s is the share of (token, vocabulary entry) pairs that the change reaches: 2/π = 0.637 for Gaussian
v, small where few logits move. The second form of the KL adds terms that are never negative, so it
keeps its digits however small the change.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Effects:
    """Of B changes over T tokens.

    Attributes:
        sparsity: float64 [B], s; NaN where nothing moved.
        kl: [B, T], KL(model ‖ changed model) in nats at each token.
        loss_change: [B, T], of predicting the next token, in nats; NaN where there is none.
        raised, lowered: int64 [B, top], vocabulary entries whose v, summed over the tokens, the
            change raises and lowers most, largest first.
    """

    sparsity: Tensor
    kl: Tensor
    loss_change: Tensor
    raised: Tensor
    lowered: Tensor


def effects(plain: Tensor, changed: Tensor, following: Tensor, top: int) -> Effects:
    """plain [T, V] and changed [B, T, V] logits; `following` int64 [T], the next tokens, −1 where
    there is none. Computed in float32 or wider, token by token, so that little memory is needed."""
    wide = torch.promote_types(changed.dtype, torch.float32)
    size, (length, vocabulary) = len(changed), plain.shape
    l1, square = changed.new_zeros(2, size, dtype=torch.float64)
    kl, loss = changed.new_full((2, size, length), torch.nan, dtype=torch.float64)
    # written again for each token: fresh memory would cost as much as the arithmetic
    moved, delta, u, curved = changed.new_zeros(4, size, vocabulary, dtype=wide)
    for t in range(length):
        before = plain[t].to(wide)
        p = before.softmax(-1)
        torch.sub(changed[:, t], before, out=delta)
        mean = delta @ p
        if not mean.isfinite().all():
            mean = _finite(delta, changed[:, t], before) @ p
        torch.sub(delta, mean[:, None], out=u)
        torch.expm1(u, out=curved).sub_(u)
        found = (curved @ p).clamp_min(0).log1p()
        if (large := ~found.isfinite()).any():  # e^u overflowed: no digits to lose then
            shifted = before.log_softmax(-1) + delta[large]
            found[large] = shifted.logsumexp(-1) - mean[large]
        kl[:, t] = found
        if (token := following[t]) >= 0:
            loss[:, t] = mean + kl[:, t] - delta[:, token]
        delta -= _median(delta, u)
        l1 += delta.norm(1, dim=-1)
        square += delta.norm(dim=-1).double().square()
        moved += delta
    most = min(top, vocabulary)
    return Effects(
        sparsity=l1.square() / square / (vocabulary * length),  # 0/0 is NaN: nothing moved
        kl=kl,
        loss_change=loss,
        raised=moved.topk(most).indices,
        lowered=moved.topk(most, largest=False).indices,
    )


def _finite(delta: Tensor, changed: Tensor, before: Tensor) -> Tensor:
    """δ with 0 for vocabulary entries that are ruled out before and after. ValueError for others
    that are not finite."""
    delta[changed == before] = 0
    if not delta.isfinite().all():
        raise ValueError("the logits after an ablation are NaN or inf, or no longer are")
    return delta


def _median(x: Tensor, spare: Tensor) -> Tensor:
    """The lower median of each row of x, [B, 1]; `spare` has its shape and is written over."""
    if x.is_cuda or x.dtype == torch.float64:
        return x.median(-1, keepdim=True).values
    # numpy's selection takes a quarter of the time of torch's on a CPU, but one thread
    middle = (x.shape[-1] - 1) // 2
    parts = np.array_split(spare.copy_(x).numpy(), torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(lambda part: part.partition(middle, axis=-1), parts))
    return spare[:, middle : middle + 1]
