"""SAE: a sparse autoencoder or transcoder, for inference and for training.

    f = activation(W_enc (t(x) - b_dec) + b_enc)         t: the input transform
    y = t⁻¹(Σ_i f_i · W_dec[i] + b_dec)  (+ W_skip x)

Row i of `W_enc` is the direction latent i reads, row i of `W_dec` the one it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saert.activations import Activation, Gated
from saert.hookpoint import Hookpoint
from saert.kernels.decode import sparse_decode
from saert.kernels.encode import Encoded
from saert.kernels.linear import linear_scores
from saert.kernels.numerics import HALF, accumulation_dtype, no_autocast
from saert.sparse import SparseCode
from saert.transforms import DatasetScale, InputTransform, NoTransform, Transformed


class SAE(nn.Module):
    """Weights, an activation and an input transform. Make one with `SAE.from_weights` or `load`.

    Attributes:
        W_enc: [num_latents, d_in]; W_dec: [num_latents, d_out].
        b_enc: [num_latents] or None; b_dec: [d_out] or None.
        W_skip: [d_out, d_in] or None: a linear path beside the dictionary (skip transcoders).
        hookpoint: where it reads; target_hookpoint: where it writes (transcoders), else None.
        metadata: base model, revision, training and measured metrics, as far as they are known.

    Weights keep the dtype they came with. Half-precision weights multiply a half-precision input in
    half precision and a wider one as it is; both accumulate in float32, and scores are never
    rounded below float32 before the selection.
    """

    whole: ClassVar[bool] = True  # False: `saert.sharded`, which has no W_enc and W_dec to show

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        *,
        activation: Activation,
        hookpoint: Hookpoint | None,
        target_hookpoint: Hookpoint | None,
        input_transform: InputTransform,
        subtract_b_dec: bool,
        W_skip: Tensor | None,
        select_by_decoder_norm: bool,
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc = None if b_enc is None else nn.Parameter(b_enc)
        self.b_dec = None if b_dec is None else nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.activation = activation
        self.hookpoint, self.target_hookpoint = hookpoint, target_hookpoint
        self.input_transform = input_transform
        self.subtract_b_dec = subtract_b_dec
        self.select_by_decoder_norm = select_by_decoder_norm
        self.metadata = dict(metadata)
        self.register_buffer("_decoder_norm", None, persistent=False)
        self.eval()

    @classmethod
    def from_weights(
        cls,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor | None = None,
        b_dec: Tensor | None = None,
        *,
        activation: Activation,
        hookpoint: Hookpoint | str | None = None,
        target_hookpoint: Hookpoint | str | None = None,
        input_transform: InputTransform | None = None,
        subtract_b_dec: bool | None = None,
        W_skip: Tensor | None = None,
        select_by_decoder_norm: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> SAE:
        """An SAE around existing tensors (not copied), without gradients until asked for.

        Args:
            W_enc, W_dec: [num_latents, d_in] and [num_latents, d_out].
            b_enc, b_dec: [num_latents] and [d_out].
            activation: TopK, BatchTopK, JumpReLU, ReLU, Gated, AbsTopK, GroupMax or
                MatchingPursuit.
            hookpoint: where it reads, in any spelling; target_hookpoint: where it writes, if
                elsewhere (a transcoder).
            input_transform: one of `saert.transforms`; None reads the hidden state as it is.
            subtract_b_dec: subtract b_dec before encoding, as Gao et al. do. Default: yes, except
                for transcoders, whose b_dec lives at another place.
            W_skip: [d_out, d_in], the linear path of a skip transcoder.
            select_by_decoder_norm: rank latents by relu(pre)·‖W_dec[i]‖ (Llama Scope).

        Raises:
            ValueError: shapes that contradict each other, NaN or inf, or options that do not
                go together; the message says what was found and what was expected.

        >>> W = torch.randn(64, 16)
        >>> sae = SAE.from_weights(W, W, activation=TopK(4), hookpoint="resid_post.0")
        >>> sae.encode(torch.randn(2, 5, 16))
        SparseCode(2x5 tokens, k=4, num_latents=64)
        """
        read = None if hookpoint is None else Hookpoint.parse(hookpoint)
        write = None if target_hookpoint is None else Hookpoint.parse(target_hookpoint)
        transcoder = write is not None or W_enc.shape[-1] != W_dec.shape[-1]
        if subtract_b_dec is None:
            subtract_b_dec = not transcoder and b_dec is not None
        transform = NoTransform() if input_transform is None else input_transform
        _check_weights(W_enc, W_dec, b_enc, b_dec, W_skip)
        activation.check(W_enc.shape[0])
        if subtract_b_dec and b_dec is None:
            raise ValueError("SAE: subtract_b_dec=True, but there is no b_dec")
        if subtract_b_dec and W_enc.shape[1] != W_dec.shape[1]:
            raise ValueError(
                f"SAE: subtract_b_dec=True needs d_in == d_out, found {W_enc.shape[1]} and "
                f"{W_dec.shape[1]}; a transcoder's b_dec belongs to its output"
            )
        if isinstance(activation, Gated) and select_by_decoder_norm:
            raise ValueError("SAE: select_by_decoder_norm is not defined for Gated")
        if isinstance(activation, Gated) and b_enc is not None:
            raise ValueError("SAE: a gated SAE has no b_enc; its biases are b_gate and b_mag")
        sae = cls(
            W_enc,
            W_dec,
            b_enc,
            b_dec,
            activation=activation,
            hookpoint=read,
            target_hookpoint=write,
            input_transform=transform,
            subtract_b_dec=subtract_b_dec,
            W_skip=W_skip,
            select_by_decoder_norm=select_by_decoder_norm,
            metadata=metadata or {},
        )
        return sae.requires_grad_(False)

    @property
    def d_in(self) -> int:
        """Width of what the SAE reads."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what the SAE writes; differs from d_in only for transcoders."""
        return self.W_dec.shape[1]

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_enc.shape[0]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes somewhere else than it reads."""
        return self.target_hookpoint is not None or self.d_in != self.d_out

    @property
    def rescales_alike(self) -> bool:
        """Whether `rescale` gives every token the same factor."""
        return self.is_transcoder or self.input_transform.scales_alike

    @property
    def decoder_version(self) -> tuple[int, int]:
        """Another value whenever W_dec has been replaced, or written in place (but by `.data`)."""
        W_dec = self.W_dec
        return W_dec.data_ptr(), 0 if W_dec.is_inference() else W_dec._version

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_enc.device

    # -- reading -------------------------------------------------------------------------------

    def transform(self, x: Tensor) -> Transformed:
        """x [*tokens, d_in] in the SAE's units, in the dtype that it computes in."""
        return self.input_transform(x.to(accumulation_dtype(self.dtype)))

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Scores before the activation: [*tokens, d_in] -> [*tokens, num_latents].

        With `latents` (int64 [E], or [*tokens or broadcastable, E]) only those are computed.
        """
        self._check_width(x)
        x, b_dec = self._reading(x)
        x = x if b_dec is None else x - b_dec.to(x.dtype)
        if latents is None:
            return linear_scores(x, self.W_enc, self.b_enc)
        bias = None if self.b_enc is None else self.b_enc[latents]
        if latents.dim() == 1:
            return linear_scores(x, self.W_enc[latents], bias)
        with no_autocast(x):
            x = x.to(accumulation_dtype(self.dtype))
            rows = self.W_enc[latents].to(x.dtype)  # [*, E, d_in]
            scores = (rows * x.unsqueeze(-2)).sum(-1)
        return scores if bias is None else scores + bias.to(scores.dtype)

    def _reading(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the encoder multiplies, and what it still has to subtract.

        Where input and weights are half precision, so are the products: rounded once, at the end.
        """
        b_dec = self.b_dec if self.subtract_b_dec else None
        z = self.transform(x).x
        if x.dtype not in HALF or self.dtype not in HALF:
            return z, b_dec
        return (z if b_dec is None else z - b_dec.to(z.dtype)).to(self.dtype), None

    def encode(self, x: Tensor) -> SparseCode:
        """x [*tokens, d_in] -> the sparse code, in float32 (float64 for float64 weights).

        Raises ValueError if a score is NaN: its token would have no meaningful selection. Inside a
        compiled or captured graph, where nothing can be raised, NaN goes unreported.
        """
        self._check_width(x)
        found = self._encoded(x)
        if _inspectable(found.nan) and found.nan.any():
            bad = found.nan.nonzero()
            first = f", first at token {bad[0].tolist()}" if bad.shape[1] else ""
            raise ValueError(
                f"SAE{self._where()}: the scores of {len(bad)} of {found.nan.numel()} tokens are "
                f"NaN{first}; the input or the weights contain NaN or inf, or the product overflows"
            )
        return SparseCode(found.indices, found.values, self.num_latents)

    def _encoded(self, x: Tensor) -> Encoded:
        z, b_dec = self._reading(x)
        return self.activation.encode_input(
            z, self.W_enc, self.b_enc, b_dec, self._selection_weight()
        )

    def activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Dense activations [*tokens, num_latents], or [*tokens, E] of the given latents.

        For a per-latent activation a few latents cost a few dot products; TopK ranks them all.
        """
        weight = self._selection_weight()
        if latents is None:
            if not self.activation.per_latent:
                return self.encode(x).to_dense()
            dense: Tensor = self.activation(self.pre_activations(x), weight)
            return dense
        if not self.activation.per_latent:
            return self.encode(x).at(latents)
        weight = None if weight is None else weight[latents]
        return self.activation.at(self.pre_activations(x, latents), latents, weight)

    # -- writing -------------------------------------------------------------------------------

    def directions(self, latents: Tensor) -> Tensor:
        """Rows of W_dec: int64 [*, E] -> [*, E, d_out], in the dtype of the weights."""
        return self.W_dec[latents]

    def written(self, latents: Tensor, values: Tensor, base: Tensor | None = None) -> Tensor:
        """base + Σ_j values_j · W_dec[latents_j]: [*tokens, d_out], in the SAE's units, no bias.

        values [*tokens, k]; latents int64 of the same shape, or [k] where tokens share them.
        """
        return sparse_decode(latents, values, self.W_dec, base=base)

    def decode(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        """The reconstruction in the model's units: [*tokens, d_out].

        Args:
            x: the input that the code came from, [*tokens, d_in]. Needed only where scaling back
                or a skip path reads it; ValueError says so if it is missing.
        """
        y = sparse_decode(code.indices, code.values, self.W_dec, self.b_dec)
        return self._restore(y, x)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x (of the target, for a transcoder): [*tokens, d_out]."""
        if torch.compiler.is_compiling() and self.activation.per_latent:
            # a sparse code of data-dependent width would break the graph
            with no_autocast(x):
                wide = accumulation_dtype(self.dtype)
                y = self.activations(x) @ self.W_dec.to(wide)
                y = y if self.b_dec is None else y + self.b_dec.to(wide)
                return self._restore(y, x)
        return self.decode(self.encode(x), x)

    def rescale(self, difference: Tensor, x: Tensor) -> Tensor:
        """A difference in the SAE's output units, in the model's units at the same tokens."""
        return difference if self.is_transcoder else self.transform(x).rescale(difference)

    def _restore(self, y: Tensor, x: Tensor | None) -> Tensor:
        if not self.is_transcoder:  # a transcoder's target was never transformed
            if isinstance(self.input_transform, DatasetScale):
                y = self.input_transform.restore_without_input(y)
            elif self.input_transform.needs_input:
                y = self.transform(_given(x, type(self.input_transform).__name__)).restore(y)
        if self.W_skip is not None:
            y = y + linear_scores(_given(x, "W_skip"), self.W_skip, None)
        return y

    # -- the decoder norm ----------------------------------------------------------------------

    def _selection_weight(self) -> Tensor | None:
        if not self.select_by_decoder_norm:
            return None
        if self._decoder_norm is None:
            return self._norms()
        return self._decoder_norm

    def _norms(self) -> Tensor:
        wide = accumulation_dtype(self.dtype)
        if self.dtype == wide:
            exact: Tensor = self.W_dec.norm(dim=-1)
            return exact
        # a few rows at a time: widened whole, half-precision weights would need thrice their memory
        norms = self.W_dec.new_empty(self.num_latents, dtype=wide)
        for start in range(0, self.num_latents, 1024):
            rows = slice(start, start + 1024)
            norms[rows] = self.W_dec[rows].to(wide).norm(dim=-1)
        return norms

    def train(self, mode: bool = True) -> SAE:
        """Training recomputes the decoder norms at every step; evaluation keeps them."""
        super().train(mode)
        fixed = self.select_by_decoder_norm and not mode
        with torch.no_grad():
            self._decoder_norm = self._norms() if fixed else None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        """`.to(dtype)` would round the norms with the weights: compute them again instead."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self.train(self.training)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.train(self.training)

    # -- the rest ------------------------------------------------------------------------------

    def _check_width(self, x: Tensor) -> None:
        if not x.dim() or x.shape[-1] != self.d_in:
            raise ValueError(
                f"SAE{self._where()} reads width {self.d_in}, but the input is {list(x.shape)}"
            )

    def _where(self) -> str:
        return "" if self.hookpoint is None else f" at {self.hookpoint}"

    def extra_repr(self) -> str:
        arrow = "" if self.target_hookpoint is None else f" -> {self.target_hookpoint}"
        size = f"d_in={self.d_in}, num_latents={self.num_latents}"
        size += f", d_out={self.d_out}" if self.is_transcoder else ""
        return f"{self.hookpoint}{arrow}, {size}, {self.dtype}"


def _inspectable(flag: Tensor) -> bool:
    """Whether a flag has a value that Python may look at: not while a graph is being recorded."""
    if torch.compiler.is_compiling() or type(flag) is not Tensor:  # a FakeTensor is a subclass
        return False
    if flag.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(flag):
        return False
    return not (flag.is_cuda and torch.cuda.is_current_stream_capturing())


def _given(x: Tensor | None, who: str) -> Tensor:
    if x is None:
        raise ValueError(f"decode: {who} needs the input; call decode(code, x)")
    return x


def _check_weights(
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_skip: Tensor | None,
) -> None:
    if W_enc.dim() != 2 or W_dec.dim() != 2 or W_enc.shape[0] != W_dec.shape[0]:
        hint = ""
        if W_enc.dim() == W_dec.dim() == 2:
            num_latents = max(W_enc.shape) if b_enc is None else b_enc.shape[0]
            if W_enc.shape[1] == W_dec.shape[0] == num_latents:
                hint = "; W_enc looks transposed: pass W_enc.T"
            elif W_enc.shape[0] == W_dec.shape[1] == num_latents:
                hint = "; W_dec looks transposed: pass W_dec.T"
        raise ValueError(
            f"SAE: W_enc is {list(W_enc.shape)} and W_dec is {list(W_dec.shape)}, expected "
            f"[num_latents, d_in] and [num_latents, d_out]{hint}"
        )
    num_latents, d_in = W_enc.shape
    expected = {
        "W_enc": (W_enc, (num_latents, d_in)),
        "W_dec": (W_dec, (num_latents, W_dec.shape[1])),
        "b_enc": (b_enc, (num_latents,)),
        "b_dec": (b_dec, (W_dec.shape[1],)),
        "W_skip": (W_skip, (W_dec.shape[1], d_in)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"SAE: {name} is {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"SAE: {name} is {tensor.dtype}, expected a floating dtype")
        if tensor.dtype != W_enc.dtype:
            raise ValueError(
                f"SAE: {name} is {tensor.dtype}, but W_enc is {W_enc.dtype}; expected one dtype "
                "(load(…, dtype=torch.float32) reads them alike)"
            )
        # the extremes keep NaN and inf, and need no copy: `isfinite` takes twenty times longer
        if tensor.is_meta or not tensor.numel():
            continue
        if not torch.stack(tensor.detach().aminmax()).isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"SAE: {name} contains NaN or inf ({bad} of {tensor.numel()} entries)")
