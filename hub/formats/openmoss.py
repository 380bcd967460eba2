"""What the three layouts of OpenMOSS have in common: Llama Scope, its R1 edition, llamascopium.

    s_in, s_out = √d_in / norm_in, √d_out / norm_out          (dataset-wise)
    pre   = (s_in x) W_enc + b_enc
    score = pre · ‖W_dec‖  if sparsity_include_decoder_norm, else pre
    f = pre · 1[score > θ]  |  pre of the k largest scores  |  relu(pre)
    y = (f W_dec + b_dec) / s_out

Latents are in these normalised units, as SAELens and Neuronpedia show them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.activations import Activation, JumpReLU, ReLU, TopK
from saert.hub.checkpoint import Checkpoint
from saert.hub.formats.hooks import places
from saert.hub.formats.torch_files import Weights
from saert.sae import SAE
from saert.transforms import DatasetScale, InputTransform, NoTransform, UnitNorm

# Said by some version of their library, and of no consequence to what is computed.
TRAINING_KEYS = {
    "device", "seed", "dtype", "bias_init_method", "decoder_exactly_fixed_norm",
    "force_unit_decoder_norm", "init_decoder_norm", "init_encoder_norm",
    "init_encoder_with_decoder_transpose", "lp", "l1_coefficient", "l1_coefficient_warmup_steps",
    "k_warmup_steps", "initial_k", "use_batch_norm_mse", "use_ghost_grads", "tp_size", "ddp_size",
    "sae_pretrained_name_or_path", "strict_loading", "use_triton_kernel",
    "sparsity_threshold_for_triton_spmm_kernel", "sparsity_threshold_for_csr",
    "jumprelu_threshold_grad_scale", "jumprelu_threshold_window", "promote_act_fn_dtype",
    "remove_gradient_parallel_to_decoder_directions", "noise_scale", "run_name",
}  # fmt: skip
KEYS = TRAINING_KEYS | {
    "sae_type", "hook_point_in", "hook_point_out", "d_model", "d_sae", "expansion_factor",
    "use_decoder_bias", "use_glu_encoder", "act_fn", "jump_relu_threshold", "top_k",
    "apply_decoder_bias_to_pre_encoder", "norm_activation", "dataset_average_activation_norm",
    "sparsity_include_decoder_norm",
}  # fmt: skip
NORM = "dataset_average_activation_norm."
UNSUPPORTED = {
    "crosscoder": "reads several activations at once",
    "mixcoder": "splits its latents between modalities",
    "clt": "a cross-layer transcoder, whose latents write at many layers",
    "lorsa": "a sparse attention layer, whose latents look at other tokens",
    "molt": "a mixture of linear transforms, which has no decoder directions",
}


@dataclass(frozen=True)
class Layout:
    """Tensor names, and whether a matrix is stored as the transpose of ours."""

    W_enc: str
    b_enc: str
    W_dec: str
    b_dec: str
    W_enc_transposed: bool
    W_dec_transposed: bool


LINEAR = Layout("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", False, True)


@dataclass(frozen=True)
class Factors:
    """What weights are multiplied by: all alike, or each latent's row, [num_latents]."""

    W_enc: float | Tensor = 1.0
    b_enc: float | Tensor = 1.0
    W_dec: float | Tensor = 1.0
    b_dec: float = 1.0
    threshold: float | Tensor = 1.0


def check_kind(c: Checkpoint, file: str) -> None:
    """Refuse what is no SAE or transcoder of one layer, and gated linear encoders."""
    config = c.configs[file]
    if (kind := config.get("sae_type", "sae")) != "sae":
        why = UNSUPPORTED.get(str(kind), "unknown to saert")
        raise c.error(f"{file}: sae_type {kind!r} ({why}), expected 'sae'")
    glu = [name for name in c.tensors.names if "glu" in name]
    if config.get("use_glu_encoder") or glu:
        raise c.error(
            f"{file}: use_glu_encoder {config.get('use_glu_encoder')!r}, tensors {glu}: a gated "
            "linear encoder (pre · σ(x W_glu + b_glu)), which saert's SAE does not have"
        )


def hooks(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """What it reads, and what it writes: the same for an SAE."""
    return config["hook_point_in"], config.get("hook_point_out", config["hook_point_in"])


def average_norms(
    c: Checkpoint, file: str, stored: Mapping[str, Any]
) -> tuple[float, float] | None:
    """norm_in, norm_out of a dataset-wise normalisation; None for the others.

    Raises FormatError for batch-wise, which depends on the other tokens of a batch.
    """
    kind = c.expect_value(
        file, "norm_activation", "dataset-wise", "token-wise", "batch-wise", "inference",
        default="dataset-wise",
    )  # fmt: skip
    if kind == "batch-wise":
        raise c.error(
            f"{file}: norm_activation 'batch-wise' divides by the mean norm of whatever batch "
            "comes along; a dataset-wise norm would be needed"
        )
    if kind != "dataset-wise":
        return None
    reads, writes = hooks(c.configs[file])
    norm_in = stored.get("in")
    norm_out = stored.get("out", norm_in if reads == writes else None)
    for norm in (norm_in, norm_out):
        if not (isinstance(norm, float | int) and 1e-30 < norm < 1e30):
            raise c.error(f"{file}: dataset-wise normalisation by average norms {dict(stored)}")
    return float(norm_in), float(norm_out)  # type: ignore[arg-type]


def norm_names(c: Checkpoint) -> set[str]:
    """Tensors that hold average norms; files keep them even where nothing is normalised by them."""
    return {name for name in c.tensors.names if name.startswith(NORM)}


def stored_norms(c: Checkpoint, file: str) -> dict[str, float]:
    """The norms of a weights file, called `dataset_average_activation_norm.<hook point>`."""
    norms = {}
    for side, hook in zip(("in", "out"), hooks(c.configs[file]), strict=True):
        if (name := f"{NORM}{hook}") in c.tensors.names:
            c.expect_shape(name)
            norms[side] = float(c.tensors.get(name, exact=True).item())
    return norms


def tensor_names(c: Checkpoint, file: str, layout: Layout) -> set[str]:
    """The tensors that every SAE of a layout has to have."""
    bias = {layout.b_dec} if c.configs[file].get("use_decoder_bias", True) else set()
    return {layout.W_enc, layout.b_enc, layout.W_dec} | bias


def plain_activation(c: Checkpoint, file: str, act_fn: str) -> Activation:
    """ReLU or TopK, whose k is the config's `top_k`."""
    if act_fn == "relu":
        return ReLU()
    if act_fn == "topk":
        return TopK(c.integer(file, "top_k"))
    raise c.error(f"{file}: act_fn {act_fn!r}, expected relu, topk or jumprelu")


def learned_threshold(c: Checkpoint, name: str, num_latents: int) -> JumpReLU:
    """JumpReLU with θ = exp of a stored [num_latents]."""
    c.expect_shape(name, num_latents)
    return JumpReLU(c.tensors.get(name, exact=True).exp())


def assemble(
    c: Checkpoint,
    file: str,
    layout: Layout,
    activation: Activation,
    *,
    metadata: dict[str, Any],
    norms: tuple[float, float] | None,
    raw: bool = False,
) -> SAE:
    """The SAE of a checkpoint whose config keys and tensor names have been checked.

    Args:
        activation: a threshold in units of the normalised score.
        norms: of `average_norms`.
        raw: latents in the model's units with unit decoder rows, as OpenMOSS runs inference.
    """
    config = c.configs[file]
    d_in, d_out = _sizes(c, file, layout)
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    hookpoint, target = places(c, *hooks(config), metadata)
    if target is None and d_in != d_out:
        raise c.error(f"an SAE that reads width {d_in} and writes width {d_out}")
    s_in = s_out = 1.0
    transform: InputTransform = NoTransform()
    if norms is not None:
        s_in, s_out = math.sqrt(d_in) / norms[0], math.sqrt(d_out) / norms[1]
        transform = DatasetScale(s_in)
    elif config.get("norm_activation") == "token-wise":
        transform = UnitNorm()
        if target is not None:
            raise c.error(
                f"{file}: a transcoder with norm_activation 'token-wise' writes in units of its "
                "target's own norm, which is not known; a dataset-wise norm would be needed"
            )
    left = 1 / s_out if target is not None else s_in / s_out  # what the SAE will not undo itself
    has_b_dec = layout.b_dec in c.tensors.names
    subtract = has_b_dec and bool(config.get("apply_decoder_bias_to_pre_encoder"))
    factors = None
    if raw:
        if isinstance(activation, TopK) and not by_norm:
            raise c.error("latents='raw' of a top-k of unweighted scores has no equivalent")
        factors = _raw_units(c, layout, s_in, s_out, by_norm)
        transform, by_norm = NoTransform(), False
    elif left != 1:  # the same latents; thresholds follow the decoder norms
        factors = Factors(W_dec=left, b_dec=left, threshold=left if by_norm else 1.0)
    if factors is None:
        W_enc, W_dec, b_enc, b_dec = _stored(c, layout)
    else:
        W_enc, W_dec, b_enc, b_dec = _rescaled(c, layout, factors, subtract)
        activation, subtract = _rescale_threshold(activation, factors.threshold), False
    return SAE.from_weights(
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        activation=activation,
        hookpoint=hookpoint,
        target_hookpoint=target,
        input_transform=transform,
        subtract_b_dec=subtract,
        select_by_decoder_norm=by_norm,
        metadata=metadata,
    )


def _sizes(c: Checkpoint, file: str, layout: Layout) -> tuple[int, int]:
    """d_in and d_out; refuses a config or biases that contradict the matrices."""
    config = c.configs[file]
    for key in ("sparsity_include_decoder_norm", "apply_decoder_bias_to_pre_encoder",
                "use_decoder_bias"):  # fmt: skip
        c.expect_value(file, key, True, False, default=False)
    encoder, decoder = c.matrix(layout.W_enc), c.matrix(layout.W_dec)
    num_latents, d_in = encoder[::-1] if layout.W_enc_transposed else encoder
    rows, d_out = decoder[::-1] if layout.W_dec_transposed else decoder
    if rows != num_latents:
        raise c.error(
            f"{layout.W_enc} is {list(encoder)} and {layout.W_dec} is {list(decoder)}: they "
            f"disagree about the number of latents, {num_latents} and {rows}"
        )
    c.expect_shape(layout.b_enc, num_latents)
    if layout.b_dec in c.tensors.names:
        c.expect_shape(layout.b_dec, d_out)
    c.expect_size(file, "d_model", d_in)
    c.expect_size(file, "d_sae", num_latents)
    if "d_sae" not in config and "expansion_factor" in config:
        factor = c.number(file, "expansion_factor", least=0)
        if int(d_in * factor) != num_latents:
            raise c.error(
                f"{file} declares expansion_factor {factor} of {d_in}, but the tensors hold "
                f"{num_latents} latents"
            )
    return d_in, d_out


def _raw_units(c: Checkpoint, layout: Layout, s_in: float, s_out: float, by_norm: bool) -> Factors:
    """f' = f · ‖W_dec‖ / s_out, so that f' W_dec / ‖W_dec‖ is in the model's units."""
    norm = c.tensors.row_norms(layout.W_dec, transpose=layout.W_dec_transposed)
    scale = norm / s_out
    return Factors(
        scale * s_in,
        scale,
        1 / torch.where(norm > 0, norm, 1),
        1 / s_out,
        1 / s_out if by_norm else scale,
    )


def _stored(c: Checkpoint, layout: Layout) -> Weights:
    return (
        c.tensors.get(layout.W_enc, transpose=layout.W_enc_transposed),
        c.tensors.get(layout.W_dec, transpose=layout.W_dec_transposed),
        c.tensors.get(layout.b_enc),
        c.tensors.get(layout.b_dec) if layout.b_dec in c.tensors.names else None,
    )


def _rescaled(c: Checkpoint, layout: Layout, by: Factors, subtract: bool) -> Weights:
    """Multiplied before they are rounded, and a b_dec that was subtracted moved into b_enc."""
    t = c.tensors
    b_enc = t.get(layout.b_enc, exact=True)
    b_dec = t.get(layout.b_dec, exact=True) if layout.b_dec in t.names else None
    if subtract and b_dec is not None:
        shift = torch.zeros_like(b_enc, device="cpu")
        for rows, columns, block in t.blocks(layout.W_enc, transpose=layout.W_enc_transposed):
            shift[rows] += block @ b_dec.to("cpu")[columns]
        b_enc = b_enc - shift.to(b_enc.device)
    return (
        t.scaled(layout.W_enc, by.W_enc, transpose=layout.W_enc_transposed),
        t.scaled(layout.W_dec, by.W_dec, transpose=layout.W_dec_transposed),
        t.cast(b_enc * by.b_enc),
        None if b_dec is None else t.cast(b_dec * by.b_dec),
    )


def _rescale_threshold(activation: Activation, by: float | Tensor) -> Activation:
    if not isinstance(activation, JumpReLU):
        return activation
    return type(activation)(activation.threshold.to(_device(by)) * by)


def _device(of: float | Tensor) -> torch.device | None:
    return of.device if isinstance(of, Tensor) else None
