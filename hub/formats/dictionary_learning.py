"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt` and `config.json` in a folder per run.

Its classes and their tensors are in KINDS. Training on normalised activations leaves no trace: the
factor is folded into the biases before a finished `ae.pt` is saved. A threshold of -1 was never
estimated, and every positive activation passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from saert.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from saert.hookpoint import Hookpoint
from saert.hub.checkpoint import Checkpoint, Family, parse_hookpoint, search
from saert.hub.formats.torch_files import (
    Weights,
    expect_count,
    expect_entries,
    expect_weights,
    known,
    read_scalar,
    read_weights,
)
from saert.sae import SAE

CONFIG = "config.json"
TRAINER, BUFFER = f"{CONFIG}: trainer", f"{CONFIG}: buffer"  # its two sections
TRAINER_KEYS = {
    "activation_dim", "activation_queue_length", "anneal_end", "anneal_start", "auxk_alpha",
    "bandwidth", "decay_start", "device", "dict_class", "dict_size", "gp_reg_coeff",
    "group_fractions", "group_sizes", "group_weights", "k", "k_anneal_steps", "l0_penalty",
    "l1_penalty", "lambda_warm_steps", "layer", "lm_name", "lr", "n_sparsity_updates",
    "norm_factor", "ortho_weight", "p_end", "p_start", "resample_steps", "seed",
    "sparsity_coeff", "sparsity_function", "sparsity_penalty", "sparsity_queue_length",
    "sparsity_warmup_steps", "steps", "submodule_name", "target_l0", "threshold_beta",
    "threshold_start_step", "top_k_aux", "trainer_class", "wandb_name", "warmup_steps",
}  # fmt: skip
BUFFER_KEYS = {
    "add_special_tokens", "ctx_len", "d_submodule", "device", "io", "layer",
    "max_activation_norm_multiple", "n_ctxs", "out_batch_size", "refresh_batch_size", "remove_bos",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One class of theirs: its weights, what else it stores, and whether it subtracts b_dec."""

    names: Mapping[str, str]
    linear: bool = True
    more: frozenset[str] = field(default_factory=frozenset)
    optional: frozenset[str] = field(default_factory=frozenset)
    subtract_b_dec: bool = True


LAYERS = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
BIASED = {**LAYERS, "b_enc": "encoder.bias"}
PARAMETERS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
COUNTED = frozenset({"k", "threshold"})

KINDS = {
    "AutoEncoder": Kind({**BIASED, "b_dec": "bias"}),
    "AutoEncoderNew": Kind({**BIASED, "b_dec": "decoder.bias"}, subtract_b_dec=False),
    "GatedAutoEncoder": Kind(
        {**LAYERS, "b_dec": "decoder_bias"}, more=frozenset({"r_mag", "gate_bias", "mag_bias"})
    ),
    # k was no tensor at first, and the threshold is for another use than inference
    "AutoEncoderTopK": Kind({**BIASED, "b_dec": "b_dec"}, optional=COUNTED),
    "BatchTopKSAE": Kind({**BIASED, "b_dec": "b_dec"}, more=COUNTED),
    "MatryoshkaBatchTopKSAE": Kind(PARAMETERS, linear=False, more=COUNTED | {"group_sizes"}),
    "JumpReluAutoEncoder": Kind(
        PARAMETERS, linear=False, more=frozenset({"threshold"}), subtract_b_dec=False
    ),
}
FORMER_NAMES = {"MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"}
PER_TOKEN, PER_BATCH = "AutoEncoderTopK", {"BatchTopKSAE", "MatryoshkaBatchTopKSAE"}

SITES = {  # what submodules are called, and their sites where the output and the input is read
    "resid_pre": ("resid_pre", "resid_pre"),
    "resid_mid": ("resid_mid", "resid_mid"),
    "resid_post": ("resid_post", "resid_pre"),
    "resid_out": ("resid_post", "resid_pre"),
    "attn_out": ("attn_out", None),
    "attention_out": ("attn_out", None),
    "mlp_in": ("mlp_in", "mlp_in"),
    "mlp_out": ("mlp_out", "mlp_in"),
}
SUBMODULE = rf"({'|'.join(SITES)})_?(?:layer_?)?(\d+)"


def read(c: Checkpoint) -> SAE:
    """All of KINDS, under their former names too.

    The option `normalize_decoder` is that of `AutoEncoder.from_pretrained`: True, the default,
    gives latents times the norm of their decoder row, as that library's users know them; False
    gives them as stored. The reconstruction is the same.

    Without config.json only what the tensors leave no doubt of is read. A backup to resume
    training from is refused: its biases are still in the units of normalised activations.
    """
    _refuse_backup(c)
    c = _sections(c)
    name = _class(c)
    kind = KINDS[name]
    expect_entries(c, {*kind.names.values(), *kind.more}, kind.optional)
    normalise = c.option("normalize_decoder", True, False)
    if name != "AutoEncoder":
        if "normalize_decoder" in c.options and normalise:
            raise c.error(f"normalize_decoder is an option of AutoEncoder, but this is {name}")
        normalise = False
    num_latents, d = expect_weights(c, kind.names, linear=kind.linear)
    for section, key, size in (
        (TRAINER, "dict_size", num_latents),
        (TRAINER, "activation_dim", d),
        (BUFFER, "d_submodule", d),
    ):
        if c.configs[section].get(key) is not None:
            c.expect_size(section, key, size)
    activation, l0 = _activation(c, name, num_latents)
    hookpoint, hook_name = _hookpoint(c)
    return SAE.from_weights(
        *(_normalised if normalise else read_weights)(c, kind.names, linear=kind.linear),
        activation=activation,
        hookpoint=hookpoint,
        subtract_b_dec=kind.subtract_b_dec,
        metadata=known(
            format="dictionary_learning",
            base_model=c.configs[TRAINER].get("lm_name"),
            hook_name=hook_name,
            context_size=c.configs[BUFFER].get("ctx_len"),
            declared=None if l0 is None else {"l0": float(l0)},
        ),
    )


def _refuse_backup(c: Checkpoint) -> None:
    if isinstance(c.tensors.extras.get("ae"), Mapping):
        keys = sorted({*c.tensors.names, *c.tensors.extras})
        raise c.error(
            f"a backup to resume training from, with {keys}: its SAE still reads activations "
            "divided by norm_factor; expected the ae.pt of a finished run, or call "
            "ae.scale_biases(norm_factor) and save ae.state_dict()"
        )


def _sections(c: Checkpoint) -> Checkpoint:
    """The checkpoint with the two sections of its config as configs of their own."""
    config = c.expect_keys(CONFIG, {"trainer"}, {"buffer"}) if CONFIG in c.configs else {}
    trainer, buffer = config.get("trainer", {}), config.get("buffer", {})
    for key, section in (("trainer", trainer), ("buffer", buffer)):
        if not isinstance(section, Mapping):
            raise c.error(f"{CONFIG}: {key} is {section!r}, expected an object")
    c = dataclasses.replace(c, configs={**c.configs, TRAINER: trainer, BUFFER: buffer})
    c.expect_keys(TRAINER, (), TRAINER_KEYS)
    c.expect_keys(BUFFER, (), BUFFER_KEYS)
    return c


def _class(c: Checkpoint) -> str:
    stated = c.configs[TRAINER].get("dict_class")
    if stated is not None:
        if (name := FORMER_NAMES.get(stated, stated)) not in KINDS:
            raise c.error(f"{CONFIG}: dict_class {stated!r}, expected one of {sorted(KINDS)}")
        return str(name)
    names = c.tensors.names
    fitting = [
        one
        for one, kind in KINDS.items()
        if (needed := {*kind.names.values(), *kind.more}) <= names <= needed | kind.optional
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise c.error(
        f"no dict_class in a config.json, and tensors {sorted(names)} fit {fitting or 'no class'}; "
        "put the config.json of the run beside ae.pt"
    )


def _activation(c: Checkpoint, name: str, num_latents: int) -> tuple[Activation, float | None]:
    """And how many latents are active, where the checkpoint says it."""
    trainer = c.configs[TRAINER]
    if name == "GatedAutoEncoder":
        for one in KINDS[name].more:
            c.expect_shape(one, num_latents)
        gate, mag, r_mag = (
            c.tensors.get(one, compared=True) for one in ("gate_bias", "mag_bias", "r_mag")
        )
        return Gated(b_gate=gate, b_mag=mag, r_mag=r_mag), None
    if name == "JumpReluAutoEncoder":
        c.expect_shape("threshold", num_latents)
        return JumpReLU(c.tensors.get("threshold", compared=True)), trainer.get("target_l0")
    if name != PER_TOKEN and name not in PER_BATCH:
        return ReLU(), None
    k = expect_count(c, "k", read_scalar(c, "k"), trainer.get("k"))
    if name == PER_TOKEN:
        return TopK(k), k
    c.expect_shape("threshold")
    if "group_sizes" in c.tensors.names:
        sizes = c.tensors.get("group_sizes", exact=True)
        if int(sizes.sum()) != num_latents:
            raise c.error(f"group_sizes add up to {int(sizes.sum())}, expected {num_latents}")
    return BatchTopK(c.tensors.get("threshold", compared=True)), k


def _normalised(c: Checkpoint, names: Mapping[str, str], *, linear: bool) -> Weights:
    """Decoder rows of unit norm, and latents that carry the norm instead."""
    norm = c.tensors.row_norms(names["W_dec"], transpose=linear)
    if torch.allclose(norm, torch.ones_like(norm)):
        return read_weights(c, names, linear=linear)
    b_enc, b_dec = (c.tensors.get(names[one], exact=True) for one in ("b_enc", "b_dec"))
    return (
        c.tensors.scaled(names["W_enc"], norm, transpose=not linear),
        c.tensors.scaled(names["W_dec"], 1 / norm.where(norm > 0, 1), transpose=linear),
        c.tensors.cast(b_enc * norm),
        c.tensors.cast(b_dec),
    )


def _hookpoint(c: Checkpoint) -> tuple[Hookpoint | None, str | None]:
    """Where it reads, and the submodule's name as the run called it."""
    trainer, buffer = c.configs[TRAINER], c.configs[BUFFER]
    name, layer = trainer.get("submodule_name"), _layer(c)
    io = c.expect_value(BUFFER, "io", "out", "in", default="out")
    if "layer" in buffer and "d_submodule" not in buffer:
        return None, name  # a buffer of single heads, which no hookpoint names
    if isinstance(name, str) and "." in name:
        return parse_hookpoint(name if io == "out" else f"{name}:in"), name
    named = search(SUBMODULE, name if name is not None else c.where)
    if named is None and name is None and layer is not None:
        return Hookpoint(site="resid_post" if io == "out" else "resid_pre", layer=layer), None
    if named is None:
        return None, name
    if layer is not None and int(named[2]) != layer:
        raise c.error(f"{TRAINER}: layer is {layer!r}, but the submodule is {named[0]!r}")
    site = SITES[named[1]][io == "in"]
    return None if site is None else Hookpoint(site=site, layer=int(named[2])), named[0]


def _layer(c: Checkpoint) -> int | None:
    """The run's layer, which its command line may have left as text."""
    layer = c.configs[TRAINER].get("layer")
    if isinstance(layer, str) and layer.isdecimal():
        return int(layer)
    if layer is None or (isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0):
        return layer
    raise c.error(f"{TRAINER}: layer is {layer!r}, expected a number from 0 on")


FAMILIES = (
    Family(
        "dictionary_learning",
        r"ae\.pt",
        read,
        may=(CONFIG,),
        options=frozenset({"normalize_decoder"}),
    ),
)
