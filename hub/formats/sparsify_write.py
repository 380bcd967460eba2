"""Writing sparsify's layout, for what its release 1.3.3 can compute (see sparsify.py).

Its SAEs subtract b_dec from what they read, its transcoders do not. An SAE that does otherwise is
written with that difference moved into b_enc: the same latents, up to rounding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saert.activations import GroupMax, TopK
from saert.architecture import Location, join, unwrap
from saert.hookpoint import Hookpoint
from saert.hub.formats.sparsify import CONFIG, MODULE, WEIGHTS
from saert.sae import SAE
from saert.transforms import NoTransform

OUTPUTS = {"embed", "resid_post", "attn_out", "mlp_out"}
INPUT_OF = {"resid_post": "resid_pre", "mlp_out": "mlp_in"}
FOLD_ROWS = 4096


def write(sae: SAE, folder: Path) -> None:
    """`cfg.json` and `sae.safetensors` into a folder, made if it is missing.

    The layout holds no hookpoint: sparsify and `load` take it from the folder's name, which
    `folder_name` gives. Raises ValueError naming what sparsify lacks.
    """
    config, tensors = _describe(sae)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS
    )
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def folder_name(
    hookpoint: Hookpoint | str, model: nn.Module | str, target: Hookpoint | str | None = None
) -> str:
    """The folder sparsify keeps an SAE in: its module's path relative to `model.base_model`.

    Args:
        model: the model, or its `model_type` where only that is known.
        target: where a transcoder writes: the output of the module whose input it reads.

    Raises:
        HookpointError: the model has no such hookpoint.
        ValueError: sparsify knows no such place, or transformers no such `model_type`.

    >>> folder_name("resid_post.6", "gpt2")
    'h.6'
    >>> folder_name("mlp_in.2", "llama", target="mlp_out.2")
    'layers.2.mlp'
    """
    reads = Hookpoint.parse(hookpoint)
    writes = reads if target is None else Hookpoint.parse(target)
    model = _skeleton(model, reads, writes) if isinstance(model, str) else model
    found: Location = writes.resolve(model)
    source = None if target is None else reads.resolve(model)
    if found.side != "out" or (
        source is not None and (source.path, source.side) != (found.path, "in")
    ):
        raise ValueError(_elsewhere(reads, None if target is None else writes))
    wrapper, inner = unwrap(model)
    prefix = getattr(inner, "base_model_prefix", "")
    base = join(wrapper, prefix if prefix in inner._modules else "")
    return found.path.removeprefix(f"{base}.") if base else found.path


def check_folder(path: str, sae: SAE, model_type: str | None) -> None:
    """Raise ValueError, saying which name would do, if a folder's does not tell where an SAE reads.

    The folder's name is all that sparsify and `load` have. Without a `model_type` only a name that
    is no module's, or has another layer, is found out.
    """
    folders = [one for one in path.split("/") if not re.fullmatch(r"seed\d+", one)]
    name, at = folders[-1] if folders else "", sae.hookpoint
    assert at is not None
    if model_type is not None:
        wanted = folder_name(at, model_type, sae.target_hookpoint)
        right = name == wanted
    else:
        wanted = f"h.{at.layer}" if at.path is None else at.path
        wanted += ".mlp" if sae.is_transcoder and at.path is None else ""
        layer = at.layer if at.path is None else None
        right = MODULE.fullmatch(name) is not None
        right &= layer is None or str(layer) in name.split(".")
        right &= at.path is None or f".{at.path}".endswith(f".{name}")
    if not right:
        raise ValueError(
            f"{path!r}: sparsify knows where an SAE reads by its folder's name only; for {at} "
            f"call it {wanted!r}" + ("" if model_type else ", as the model calls that module")
        )


def _skeleton(model_type: str, *hookpoints: Hookpoint) -> nn.Module:
    """A model of that type without weights, as deep as the hookpoints need."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = [int(layer) for at in hookpoints for layer in re.findall(r"\.(\d+)", str(at))]
    depth = {"num_hidden_layers": max(layers, default=0) + 1}
    for size in (depth, {}):  # some configs describe every layer, and refuse another number
        try:
            with torch.device("meta"):
                config = AutoConfig.for_model(model_type, **size)
                model: nn.Module = AutoModelForCausalLM.from_config(config)
            return model
        except Exception as error:  # each config and model class checks itself in its own way
            why = str(error).partition("\n")[0]
    raise ValueError(f"model_type {model_type!r}: {why}; pass the model itself")


def _elsewhere(reads: Hookpoint, writes: Hookpoint | None) -> str:
    if writes is None:
        return f"sparsify reads the output of one module, which {reads} is not"
    return f"sparsify transcodes one module's input to its output, not {reads} to {writes}"


def _describe(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    activation, lacking = sae.activation, _lacking(sae)
    if lacking or not isinstance(activation, TopK | GroupMax):
        raise ValueError(f"save: {lacking}; format='saelens' can hold this SAE")
    n, d = sae.num_latents, sae.d_in
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": _b_enc(sae, subtracts=not sae.is_transcoder),
        "W_dec": sae.W_dec,
        "b_dec": sae.W_dec.new_zeros(d) if sae.b_dec is None else sae.b_dec,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    norms = sae.W_dec.float().norm(dim=-1)
    config = {
        "activation": "groupmax" if isinstance(activation, GroupMax) else "topk",
        "expansion_factor": max(1, n // d),
        "normalize_decoder": bool(((norms - 1).abs() < 0.01).all()),  # for who trains on
        "num_latents": n,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.is_transcoder,
        "d_in": d,
    }
    return config, tensors


def _lacking(sae: SAE) -> str | None:
    """What sparsify lacks for this SAE, if anything."""
    if type(sae.activation) not in (TopK, GroupMax):
        return f"sparsify has TopK and GroupMax, and no {type(sae.activation).__name__}"
    if sae.input_transform != NoTransform():
        return f"sparsify has no input transforms; this SAE has {sae.input_transform}"
    if sae.select_by_decoder_norm:
        return "sparsify does not select by decoder norm"
    if sae.d_in != sae.d_out:
        return f"sparsify writes the width it reads, here {sae.d_in}, and not {sae.d_out}"
    reads, writes = sae.hookpoint, sae.target_hookpoint
    if reads is not None and not _is_one_module(reads, writes):
        return _elsewhere(reads, writes)
    return None


def _is_one_module(reads: Hookpoint, writes: Hookpoint | None) -> bool:
    """As far as names tell; `folder_name` asks the model."""
    if writes is None:
        return reads.side == "out" if reads.path else reads.site in OUTPUTS
    if reads.path is None or writes.path is None:
        return reads.layer == writes.layer and INPUT_OF.get(str(writes.site)) == reads.site
    return (reads.path, reads.side, writes.side) == (writes.path, "in", "out")


def _b_enc(sae: SAE, *, subtracts: bool) -> Tensor:
    """The encoder's bias for a reader that subtracts b_dec, or does not."""
    b_enc = sae.W_enc.new_zeros(sae.num_latents) if sae.b_enc is None else sae.b_enc
    if sae.b_dec is None or sae.subtract_b_dec == subtracts or not sae.b_dec.any():
        return b_enc
    if sae.dtype.itemsize < 4:
        raise ValueError(
            f"save: sparsify {'subtracts' if subtracts else 'does not subtract'} b_dec from its "
            f"input here, and this SAE does the opposite; folding that into a {sae.dtype} b_enc "
            "would change its latents. Convert the SAE with .to(torch.float32) first"
        )
    b_dec = sae.b_dec.double()
    shift = torch.cat([rows.double() @ b_dec for rows in sae.W_enc.split(FOLD_ROWS)])
    return (b_enc.double() + (shift if subtracts else -shift)).to(b_enc.dtype)
