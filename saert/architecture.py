"""Where the tensors of a transformer live, read off its module tree.

    resid_mid  = resid_pre + attn_out
    resid_post = resid_mid + mlp_out           (parallel blocks: resid_pre + attn_out + mlp_out)

Every site is the input or the output of one module. Which one follows from the names of the block's
children and, for the three sites those equations tie together, from its norms: `LAYOUTS` lists the
norm layouts whose forward has been read. A block of any other layout keeps the sites that need no
norm, and refuses the rest by name rather than handing out a tensor that is nearly the right one.
Nothing here looks at a library version or at a model class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

Side: TypeAlias = Literal["in", "out"]

SITES = (
    "embed", "resid_pre", "resid_mid", "resid_post",
    "attn_out", "attn_z", "mlp_in", "mlp_out", "mlp_act",
)  # fmt: skip


class HookpointError(ValueError):
    """A hookpoint that cannot be read, or that this model does not have."""


@dataclass(frozen=True)
class Location:
    """One tensor of one model: the first tensor input of `module`, or its (first) output.

    Equal locations are the same tensor, edited the same way. It is `[batch, sequence, width]`, or
    `[batch * sequence, width]` where the model flattens its tokens (OPT's MLP, Llama 4's experts).
    """

    path: str  # relative to the model that was passed in
    module: nn.Module = field(compare=False, repr=False)
    side: Side
    width: int | None = field(default=None, compare=False)  # last dimension, if known without a run
    # resid_mid only: the block keeps the stream in a local variable too, so an edit here must also
    # be added to the output of the block at this path.
    carry: str | None = None


class Layout(NamedTuple):
    """What the norms of a block say. The first three name children of the block."""

    mid: str | None = None  # its input is the stream between attention and MLP
    attn: str | None = None  # attention's output passes it before joining the stream
    mlp: str | None = None  # and so does the MLP's
    why: str = ""  # there is no mid


MLP_ITSELF = "<mlp>"  # a mid where no norm stands before the MLP
PARALLEL = "attention and MLP read the same input in parallel, so no stream runs between them"
GATED = "the block gates or rescales the stream once more after its MLP"

_IN, _ATTENTION, _MLP = "input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
_BEFORE_MLP = "pre_feedforward_layernorm"

LAYOUTS: dict[frozenset[str], Layout] = {
    # before attention and before the MLP
    frozenset(("ln_1", "ln_2")): Layout("ln_2"),  # gpt2, gpt_neo
    frozenset((_IN, _ATTENTION)): Layout(_ATTENTION),  # llama and most others
    frozenset(("self_attn_layer_norm", "final_layer_norm")): Layout("final_layer_norm"),  # opt
    frozenset(("norm_1", "norm_2")): Layout("norm_2"),  # mpt
    frozenset(("operator_norm", "ffn_norm")): Layout("ffn_norm"),  # lfm2
    frozenset(("attention_layernorm", "feedforward_layernorm")): Layout(  # apertus
        "feedforward_layernorm"
    ),
    # before both at once
    frozenset(("ln_1",)): Layout(why=PARALLEL),  # gptj, codegen
    frozenset((_IN,)): Layout(why=PARALLEL),  # phi, cohere, falcon and stablelm where parallel
    frozenset(("ln_attn", "ln_mlp")): Layout(why=PARALLEL),  # falcon, new decoder
    # after each, on what it adds to the stream: olmo2, olmo3, exaone4
    frozenset((_ATTENTION, _MLP)): Layout(MLP_ITSELF, _ATTENTION, _MLP),
    # before and after: gemma2 and gemma3; gemma4, which then goes on; afmoe; and glm4, where
    # post_attention_layernorm is the norm before the MLP
    frozenset((_IN, _ATTENTION, _BEFORE_MLP, _MLP)): Layout(_BEFORE_MLP, _ATTENTION, _MLP),
    frozenset((_IN, _ATTENTION, _BEFORE_MLP, _MLP, "post_per_layer_input_norm")): Layout(
        None, _ATTENTION, _MLP, GATED
    ),
    frozenset((_IN, _ATTENTION, "pre_mlp_layernorm", "post_mlp_layernorm")): Layout(
        "pre_mlp_layernorm", _ATTENTION, "post_mlp_layernorm"
    ),
    frozenset((_IN, "post_self_attn_layernorm", _ATTENTION, "post_mlp_layernorm")): Layout(
        _ATTENTION, "post_self_attn_layernorm", "post_mlp_layernorm"
    ),
    # neither attention nor MLP: mamba
    frozenset(("norm",)): Layout(why="the block is one mixer, not attention and MLP"),
}

# Attributes of a block which say that its output is not `resid_mid + f(resid_mid)`, so that an edit
# at resid_mid could not be carried to it.
NO_MID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_parallel_residual": (lambda value: bool(value), PARALLEL),
    "apply_residual_connection_post_layernorm": (
        lambda value: bool(value),
        "the stream continues from its norms' output (apply_residual_connection_post_layernorm)",
    ),
    "do_layer_norm_before": (
        lambda value: not value,
        "its norms sit on the stream itself (do_layer_norm_before=False)",
    ),
    "layer_scalar": (lambda value: value is not None, GATED),
}

# Attributes of blocks that scale or shift what attention and MLP add, though their norms are named
# like Llama's: minimax, beam, falcon_h1, gpt_neox_japanese.
SCALED = (
    "attn_alpha_factor", "attn_residual_add_idx", "attn_out_multiplier", "attention.dense_bias",
)  # fmt: skip

ATTENTION = ("attn", "self_attn", "attention", "self_attention")
ATTENTION_OUT = ("c_proj", "o_proj", "out_proj", "dense", "attention.out_proj")  # last: gpt_neo
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
MLP_DOWN = ("c_proj", "down_proj", "fc_out", "fc2", "dense_4h_to_h", "w2")
# Children that hold weights and leave the equations above true: OPT's MLP, what hybrid models put
# in attention's place, Gemma 4's per-layer gate (behind the MLP, see GATED).
BENIGN = (
    "fc1", "fc2", "mamba", "mixer", "linear_attn", "conv",
    "per_layer_input_gate", "per_layer_projection",
)  # fmt: skip


# --------------------------------------------------------------------------- the model


def unwrap(model: nn.Module) -> tuple[str, nn.Module]:
    """Path ("" if bare) and module of the model inside torch.compile, DDP, FSDP and PEFT."""
    path = ""
    while inner := _wrapped(model):
        path, model = join(path, inner), model.get_submodule(inner)
    return path, model


def _wrapped(model: nn.Module) -> str:
    children = model._modules
    for name in ("_orig_mod", "module", "_fsdp_wrapped_module"):
        if [*children] == [name]:
            return name
    tuner = children.get("base_model")  # transformers' own base_model is a property, no child
    if tuner is None:
        return ""
    # Prompt tuning keeps the model itself here; LoRA and its kin a tuner, which has no config.
    return "base_model" if "config" in vars(tuner) else "base_model.model"


def join(*parts: str) -> str:
    """Module path from its non-empty parts."""
    return ".".join(part for part in parts if part)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the transformer blocks: the ModuleList as long as the text config is deep.

    Raises:
        HookpointError: no config, no such list, or several (encoder-decoder models).
    """
    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    deep = [(p, m) for p, m in lists if len(m) == depth]
    # A list inside a candidate's blocks (experts, say) may happen to be as long.
    deep = [(p, m) for p, m in deep if not any(p.startswith(other + ".") for other, _ in deep)]
    if len(deep) > 1:  # a vision tower of the same depth has a config of its own
        deep = [(p, m) for p, m in deep if _model_type(model, p) == config.model_type] or deep
    if len(deep) != 1:
        found = (
            ", ".join(f"{p} ({len(m)})" for p, m in (deep or lists)[:8]) or "no ModuleList at all"
        )
        raise HookpointError(
            f"expected one list of {depth} blocks in {type(model).__name__} ({config.model_type}), "
            f"found {found}; name the module by its path instead of a site"
        )
    return deep[0]


def backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module that owns the blocks: `model`, `transformer`, `model.language_model`, ..."""
    path = blocks(model)[0].rpartition(".")[0]
    return path, model.get_submodule(path)


def text_config(model: nn.Module) -> Any:
    """The text part of the first transformers config in the module tree.

    Raises:
        HookpointError: there is none, or it has several text parts.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            try:
                return config.get_text_config()
            except ValueError as error:  # several text models, none of them the one
                raise HookpointError(f"{error}; name the module by its path") from None
    raise HookpointError(
        f"{type(model).__name__} has no transformers config, so it has no sites; "
        "name a module by its path"
    )


def _model_type(model: nn.Module, list_path: str) -> str | None:
    owner = model.get_submodule(list_path.rpartition(".")[0])
    return getattr(getattr(owner, "config", None), "model_type", None)


# --------------------------------------------------------------------------- the sites


def locate(model: nn.Module, site: str, layer: int | None) -> Location:
    """Where `site` (one of `SITES`) of block `layer` (None for embed) lives in `model`.

    Raises:
        HookpointError: the layer is out of range, or blocks of this architecture lack the site.
    """
    if layer is None:
        return _embedding(model)
    config = text_config(model)
    list_path, layers = blocks(model)
    if layer not in range(len(layers)):
        raise HookpointError(
            f"no {site}.{layer}: {config.model_type} has layers 0 to {len(layers) - 1}"
        )
    inner, block = unwrap(layers[layer])
    block_path = join(list_path, str(layer))
    try:
        path, side, width = SITE_FINDERS[site](block)
    except HookpointError as error:
        raise HookpointError(
            f"no {site}.{layer} on {config.model_type}: {error}. "
            f"Layer {layer} has {', '.join(_sites_of(block))}"
        ) from None
    path = join(block_path, inner, path) if path else block_path
    carry = block_path if site == "resid_mid" else None
    hidden = getattr(config, "hidden_size", None)
    return Location(path, model.get_submodule(path), side, width or hidden, carry)


def features(module: nn.Module, side: Side) -> int | None:
    """Size of the last dimension at one side of a linear, embedding or norm module, else None."""
    # Attributes, not weight shapes: quantised weights are packed. nx and nf are Conv1D's.
    names = ("in_features", "nx") if side == "in" else ("out_features", "nf", "embedding_dim")
    for name in names:
        if isinstance(size := getattr(module, name, None), int):
            return size
    weight: Any = getattr(module, "weight", None)
    return len(weight) if getattr(weight, "ndim", 0) == 1 else None


Found: TypeAlias = tuple[
    str, Side, int | None
]  # path in the block, side, width where it is not hidden_size


def _embedding(model: nn.Module) -> Location:
    path, owner = backbone(model)
    embedding: Any = getattr(owner, "get_input_embeddings", lambda: None)()
    for name, module in owner.named_modules():
        if module is embedding:
            return Location(join(path, name), module, "out", features(module, "out"))
    raise HookpointError(f"embed: {type(owner).__name__} at {path!r} has no input embedding")


def _resid_pre(block: nn.Module) -> Found:
    return "", "in", None


def _resid_post(block: nn.Module) -> Found:
    return "", "out", None


def _resid_mid(block: nn.Module) -> Found:
    for name, (refused, why) in NO_MID.items():
        if hasattr(block, name) and refused(getattr(block, name)):
            raise HookpointError(why)
    layout = _layout(block)
    if layout.mid is None:
        raise HookpointError(layout.why)
    return (_mlp_in(block)[0] if layout.mid is MLP_ITSELF else layout.mid), "in", None


def _attn_out(block: nn.Module) -> Found:
    attention = _attention(block)
    return _contribution(block, attention, _layout(block).attn, ATTENTION_OUT), "out", None


def _attn_z(block: nn.Module) -> Found:
    attention = _attention(block)
    projection = _projection(block, attention, ATTENTION_OUT, "output")
    return projection, "in", features(block.get_submodule(projection), "in")


def _mlp_in(block: nn.Module) -> Found:
    mlp = _mlp(block)
    return mlp or "fc1", "in", None


def _mlp_out(block: nn.Module) -> Found:
    mlp = _mlp(block)
    return _contribution(block, mlp, _layout(block).mlp, MLP_DOWN), "out", None


def _mlp_act(block: nn.Module) -> Found:
    projection = _projection(block, _mlp(block), MLP_DOWN, "down")
    return projection, "in", features(block.get_submodule(projection), "in")


SITE_FINDERS: dict[str, Callable[[nn.Module], Found]] = {
    "resid_pre": _resid_pre, "resid_mid": _resid_mid, "resid_post": _resid_post,
    "attn_out": _attn_out, "attn_z": _attn_z,
    "mlp_in": _mlp_in, "mlp_out": _mlp_out, "mlp_act": _mlp_act,
}  # fmt: skip


def _sites_of(block: nn.Module) -> list[str]:
    def has(site: str) -> bool:
        try:
            return bool(SITE_FINDERS[site](block))
        except HookpointError:
            return False

    return [site for site in SITES if site in SITE_FINDERS and has(site)]


def _layout(block: nn.Module) -> Layout:
    """The layout of a block, if what its parts add to the stream is all that the block adds."""
    children = dict(block.named_children())
    norms = {name for name in children if "norm" in name or name.startswith("ln_")}
    weighty = {
        name for name, child in children.items() if next(child.parameters(), None) is not None
    }
    strangers = weighty - norms - {*ATTENTION, *MLP, *BENIGN} | {
        n for n in SCALED if _has(block, n)
    }
    strangers |= {name for name, parameter in block.named_parameters(recurse=False)}
    if strangers or frozenset(norms) not in LAYOUTS:
        what = ("its " + ", ".join(sorted(strangers))) if strangers else f"norms {sorted(norms)}"
        raise HookpointError(
            f"saert has not verified what {type(block).__name__} adds to the stream, given {what}; "
            f"name the module by its path (children: {', '.join(children)})"
        )
    return LAYOUTS[frozenset(norms)]


def _has(module: nn.Module, dotted: str) -> bool:
    value: Any = module
    for name in dotted.split("."):
        value = getattr(value, name, None)
    return value is not None


def _contribution(
    block: nn.Module, part: str, norm: str | None, projections: tuple[str, ...]
) -> str:
    """Path of the module whose output is what `part` adds to the stream ("": OPT's fc1 and fc2)."""
    if norm is not None:
        return norm
    # Bloom and MPT hand the stream to the module, which returns the sum: step inside it.
    takes_residual = (
        "residual" in inspect.signature(type(block.get_submodule(part)).forward).parameters
    )
    return _projection(block, part, projections, "output") if takes_residual or not part else part


def _attention(block: nn.Module) -> str:
    return _first(block, ATTENTION, "attention")


def _mlp(block: nn.Module) -> str:
    """Path of the MLP in its block; "" where the block itself owns fc1 and fc2 (OPT, BioGPT)."""
    children = block._modules
    return "" if "fc1" in children and "fc2" in children else _first(block, MLP, "MLP")


def _projection(block: nn.Module, part: str, names: tuple[str, ...], what: str) -> str:
    module = block.get_submodule(part)
    if "experts" in module._modules:
        raise HookpointError(
            "its experts are fused into one tensor, and no module sees the activations"
        )
    if getattr(module, "slow_but_exact", False) and getattr(module, "pretraining_tp", 1) > 1:
        raise HookpointError(
            f"slow_but_exact multiplies by slices of the {what} projection, unhooked"
        )
    return join(part, _first(module, names, f"{what} projection"))


def _first(module: nn.Module, names: tuple[str, ...], what: str) -> str:
    for name in names:
        if _has(module, name):
            return name
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    raise HookpointError(f"no {what} among the children of {type(module).__name__}: {children}")
