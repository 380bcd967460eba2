"""The trainable side of an SAE: this process's latents, and what all of them share.

    scores = W_enc (x − b_dec) + b_enc,        ŷ = Σ over latents of f_i W_dec[i] + b_dec + W_skip x

x and y are in the units of training: after the input transform, and for a transcoder's y after its
own scale. `export` brings the weights back to the model's units.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saert.kernels.decode import sparse_decode
from saert.kernels.encode import encode_topk
from saert.kernels.linear import linear_scores
from saert.train.mesh import Mesh
from saert.train.selection import batch_largest, token_ranks

REPLICATED = ("b_dec", "W_skip")


class Code(NamedTuple):
    """This shard's slots of a sparse code: int64 and float [T, slots], local latents.

    A slot that is unused, or whose latent lost against another shard's, has value 0.
    """

    indices: Tensor
    values: Tensor


class Dictionary(nn.Module):
    """Parameters of one SAE in training. W_enc [local, d_in], W_dec [local, d_out], b_enc [local],
    b_dec [d_out], W_skip [d_out, d_in] or None.

    Attributes:
        num_latents: in the whole dictionary; `latents` is this shard's slice of them.
        extra: an objective's own parameters, each [local].
        state: an objective's own numbers that no gradient moves: [local], or one for all latents.
        compute: the dtype of the products (bfloat16 keeps float32 scores and master weights).
    """

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        W_skip: Tensor | None = None,
        *,
        num_latents: int | None = None,
        mesh: Mesh | None = None,
        subtract_b_dec: bool = True,
        compute: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mesh = mesh or Mesh()
        self.num_latents = len(W_enc) if num_latents is None else num_latents
        local = self.num_latents // self.mesh.shards
        if local * self.mesh.shards != self.num_latents or len(W_enc) != local:
            raise ValueError(
                f"{self.num_latents} latents over {self.mesh.shards} shards: found {len(W_enc)} "
                "here; the shards must divide the latents evenly"
            )
        self.latents = slice(self.mesh.shard * local, (self.mesh.shard + 1) * local)
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc, self.b_dec = nn.Parameter(b_enc), nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.subtract_b_dec = subtract_b_dec
        self.compute = compute or W_enc.dtype
        self.extra = nn.ParameterDict()
        self.state: dict[str, Tensor] = {}

    @property
    def local(self) -> int:
        """Latents of this shard."""
        return len(self.W_enc)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    # -- reading -----------------------------------------------------------------------------------

    def scores(self, x: Tensor) -> Tensor:
        """Pre-activations of all of this shard's latents, dense: [T, d_in] -> [T, local]."""
        b_dec = self._subtracted()
        x = x if b_dec is None else x - b_dec
        return linear_scores(x, self.W_enc.to(self.compute), self.b_enc)

    def best(
        self, x: Tensor, k: int, *, latents: Tensor | None = None, weight: Tensor | None = None
    ) -> Code:
        """This shard's k largest positive scores of each token, largest first, whatever the other
        shards hold. `latents`: int64, local, the only ones that compete; `weight` [local]
        multiplies the scores for the ranking alone."""
        found = encode_topk(
            x,
            self.W_enc.to(self.compute),
            self.b_enc.to(self.compute),
            k,
            b_dec=self._subtracted(),
            latents=latents,
            weight=weight,
        )
        if found.nan.any():
            raise FloatingPointError("the scores contain NaN")
        return Code(found.indices, found.values)

    def topk(
        self, x: Tensor, k: int, *, latents: Tensor | None = None, weight: Tensor | None = None
    ) -> Code:
        """The k largest positive scores of each token among all shards' latents, exactly."""
        code = self.best(x, k, latents=latents, weight=weight)
        return code if self.mesh.shards == 1 else narrow(code, k, self.mesh, weight)

    def batch_topk(self, x: Tensor, k: int, tokens: int) -> tuple[Code, Tensor]:
        """The k · tokens largest positive scores of the batch (`tokens` over all replicas), and
        the smallest of them (0 if there is none)."""

        def best(width: int) -> tuple[Tensor, Tensor]:
            code = widen(self.best(x, width), width)
            return code.indices, code.values

        indices, values, kept, least = batch_largest(best, tokens, k, self.local, self.mesh)
        return Code(indices, torch.where(kept, values, 0)), least

    def _subtracted(self) -> Tensor | None:
        return self.mesh.shared(self.b_dec).to(self.compute) if self.subtract_b_dec else None

    # -- writing -----------------------------------------------------------------------------------

    def decode(self, code: Code, x: Tensor | None = None, *, bias: bool = True) -> Tensor:
        """The reconstruction [T, d_out]. `x` is needed where there is a W_skip; without `bias`
        only the latents' part (AuxK explains a residual, which has no bias)."""
        W_dec = self.W_dec.to(self.compute)
        return self._finish(sparse_decode(code.indices, code.values, W_dec), x, bias)

    def decode_dense(self, f: Tensor, x: Tensor | None = None, *, bias: bool = True) -> Tensor:
        """The same from dense activations f [T, local]."""
        W_dec = self.W_dec.to(self.compute)
        return self._finish((f.to(self.compute) @ W_dec).to(f.dtype), x, bias)

    def _finish(self, y: Tensor, x: Tensor | None, bias: bool) -> Tensor:
        y = self.mesh.sum_latents(y)
        if not bias:
            return y
        y = y + self.b_dec
        if self.W_skip is not None:
            assert x is not None, "a skip transcoder decodes next to its input"
            y = y + x @ self.W_skip.T
        return y

    def decoder_norm(self) -> Tensor:
        """‖W_dec[i]‖ of this shard's latents, [local]."""
        norm: Tensor = self.W_dec.norm(dim=-1)
        return norm

    # -- all shards together -----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and state by name, this shard's part, for checkpoints and averages."""
        found = {name: p.detach() for name, p in self.named_parameters()}
        return found | {f"state.{name}": t for name, t in self.state.items()}

    @torch.no_grad()
    def whole(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The same, with the shards side by side. Every rank has to call it."""
        found = self.tensors() if tensors is None else tensors
        return {
            name: t if is_replicated(name, t) else self.mesh.gather_latents(t, 0)
            for name, t in found.items()
        }


def is_replicated(name: str, tensor: Tensor) -> bool:
    """Whether every shard holds the same tensor, and not its own latents' part of one. A name may
    have others in front, as in `resid_post.6/exp_avg.b_dec`."""
    return re.split("[./]", name)[-1] in REPLICATED or tensor.dim() == 0


def widen(code: Code, width: int) -> Code:
    """The same slots, filled up with unused ones: shards exchange equal shapes."""
    extra = (0, width - code.values.shape[-1])
    pad = torch.nn.functional.pad
    return Code(pad(code.indices, extra), pad(code.values, extra))


def narrow(code: Code, k: int, mesh: Mesh, weight: Tensor | None = None) -> Code:
    """The k best slots of each token among all shards; slots are ordered, best first."""
    if mesh.shards == 1:
        return Code(code.indices[:, :k], code.values[:, :k])
    code = widen(code, max(k, code.values.shape[-1]))
    ranked = code.values.detach()
    ranked = ranked if weight is None else ranked * weight[code.indices]
    kept = token_ranks(ranked, mesh) < k
    return Code(code.indices, torch.where(kept, code.values, 0))
