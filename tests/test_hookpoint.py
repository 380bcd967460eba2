"""Every site of every architecture against arithmetic done by hand on the model's weights.

A hook shows what the resolved location holds. What it should hold comes from elsewhere:
transformers' own `hidden_states`, and the block's equations recomputed from weights that the table
below names for each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    VOCAB,
    peft_wrap,
    tiny,
    tiny_multimodal,
)
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from saert.hookpoint import SITES, Hookpoint, HookpointError, Location, backbone, blocks, unwrap

BATCH, TOKENS = 2, 7


@dataclass(frozen=True)
class Block:
    """Where an architecture keeps what the equations need; every name is relative to the block."""

    norm: str | None  # before the MLP
    out: str  # attention's output projection
    mlp: str
    down: str  # the MLP's
    parallel: bool = False  # the MLP reads the block's input, not the stream after attention
    after: tuple[str | None, str | None] = (None, None)  # norms on attention's and the MLP's output
    multiplier: float = 1.0  # on both contributions
    stream_norms: tuple[str | None, str | None] = (
        None,
        None,
    )  # on the stream, before or after a part


GPT2 = Block("ln_2", "attn.c_proj", "mlp", "mlp.c_proj")
LLAMA = Block("post_attention_layernorm", "self_attn.o_proj", "mlp", "mlp.down_proj")
GEMMA = Block(
    "pre_feedforward_layernorm", LLAMA.out, LLAMA.mlp, LLAMA.down,
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)  # fmt: skip
OLMO2 = Block(None, LLAMA.out, LLAMA.mlp, LLAMA.down, after=GEMMA.after)
NEOX = Block("post_attention_layernorm", "attention.dense", "mlp", "mlp.dense_4h_to_h")
BLOOM = Block("post_attention_layernorm", "self_attention.dense", "mlp", "mlp.dense_4h_to_h")
BESIDE = dict(norm="input_layernorm", parallel=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(block: Block, **changes: Any) -> Block:
    return Block(**(vars(block) | changes))


# The block, the final norm, the embedding.
MODELS: dict[str, tuple[Block, str, str]] = {
    "gpt2": (GPT2, "transformer.ln_f", "transformer.wte"),
    "gptj": (
        Block("ln_1", "attn.out_proj", "mlp", "mlp.fc_out", parallel=True),
        "transformer.ln_f",
        "transformer.wte",
    ),
    "gpt_neo": (row(GPT2, out="attn.attention.out_proj"), "transformer.ln_f", "transformer.wte"),
    "gpt_neox": (row(NEOX, parallel=True), "gpt_neox.final_layer_norm", "gpt_neox.embed_in"),
    "gpt_neox_sequential": (NEOX, "gpt_neox.final_layer_norm", "gpt_neox.embed_in"),
    "phi": (
        row(LLAMA, out="self_attn.dense", down="mlp.fc2", **BESIDE),
        "model.final_layernorm",
        "model.embed_tokens",
    ),
    "opt": (
        Block("final_layer_norm", "self_attn.out_proj", "", "fc2"),
        "model.decoder.final_layer_norm",
        "model.decoder.embed_tokens",
    ),
    "opt_post_norm": (
        Block(
            None, "self_attn.out_proj", "", "fc2",
            stream_norms=("self_attn_layer_norm", "final_layer_norm"),
        ),
        "model.decoder.project_out",
        "model.decoder.embed_tokens",
    ),
    "falcon_sequential": (BLOOM, "transformer.ln_f", "transformer.word_embeddings"),
    "falcon_parallel": (row(BLOOM, **BESIDE), "transformer.ln_f", "transformer.word_embeddings"),
    "falcon_new": (
        row(BLOOM, norm="ln_mlp", parallel=True), "transformer.ln_f", "transformer.word_embeddings",
    ),
    "bloom": (BLOOM, "transformer.ln_f", "transformer.word_embeddings"),
    "bloom_post_norm": (
        row(BLOOM, stream_norms=("input_layernorm", "post_attention_layernorm")),
        "transformer.ln_f",
        "transformer.word_embeddings",
    ),
    "mamba": (LLAMA, "backbone.norm_f", "backbone.embeddings"),
} | {
    name: (block, "model.norm", "model.embed_tokens")
    for name, block in {
        **dict.fromkeys(
            ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi3", "olmo",
             "stablelm", "smollm3", "gpt_oss"],
            LLAMA,
        ),
        "gemma2": GEMMA,
        "gemma3_text": GEMMA,
        "olmo2": OLMO2,
        "olmo3": OLMO2,
        "stablelm_parallel": row(LLAMA, **BESIDE),
        "cohere": row(LLAMA, **BESIDE),
        "granite": row(LLAMA, multiplier=0.22),
        "llama4_text": row(LLAMA, mlp="feed_forward", down="feed_forward.down_proj"),
        "glm4": row(LLAMA, after=("post_self_attn_layernorm", "post_mlp_layernorm")),
    }.items()
}  # fmt: skip

PARALLEL = "in parallel"
FUSED = "experts are fused"
# Every refusal there is: (architecture, site) -> layers, and what the message says.
REFUSED: dict[tuple[str, str], tuple[set[int], str]] = {
    **{
        (name, "resid_mid"): ({0, 1, 2}, PARALLEL)
        for name in ["gptj", "gpt_neox", "phi", "cohere", "falcon_parallel", "falcon_new",
                     "stablelm_parallel"]
    },
    ("opt_post_norm", "resid_mid"): ({0, 1, 2}, "norms sit on the stream"),
    ("bloom_post_norm", "resid_mid"): ({0, 1, 2}, "apply_residual_connection_post_layernorm"),
    ("mixtral", "mlp_act"): ({0, 1, 2}, FUSED),
    ("gpt_oss", "mlp_act"): ({0, 1, 2}, FUSED),
    ("qwen3_moe", "mlp_act"): ({1, 2}, FUSED),
    ("llama4_text", "mlp_act"): ({1}, FUSED),
    ("mamba", "resid_mid"): ({0, 1, 2}, "one mixer"),
    **{("mamba", site): ({0, 1, 2}, "no attention") for site in ("attn_out", "attn_z")},
    **{("mamba", site): ({0, 1, 2}, "no MLP") for site in ("mlp_in", "mlp_out", "mlp_act")},
}  # fmt: skip

EMBEDDING_SCALE = dict.fromkeys(["gemma", "gemma2", "gemma3_text"], HIDDEN**0.5)
FLAT = {("opt", site) for site in ("resid_mid", "mlp_in", "mlp_out", "mlp_act")} | {
    ("opt_post_norm", site) for site in ("mlp_in", "mlp_out", "mlp_act")
}  # sites of [batch * sequence, width]; and mlp_out of Llama 4's sparse layer


def sites(name: str) -> Iterator[Hookpoint]:
    """The hookpoints an architecture has."""
    yield Hookpoint(site="embed")
    for layer in range(LAYERS):
        for site in SITES[1:]:
            if layer not in REFUSED.get((name, site), (set(), ""))[0]:
                yield Hookpoint(site=site, layer=layer)


# ------------------------------------------------------------------ reading, and arithmetic by hand


@cache
def model(name: str) -> PreTrainedModel:
    return tiny(name)


@cache
def prompt() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))


@contextmanager
def hooked(location: Location, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show the tensor at a location to `function`, and put what it returns in its place."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, kwargs | {"hidden_states": new})

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        new = function(out[0] if isinstance(out, tuple) else out)
        return (new, *out[1:]) if new is not None and isinstance(out, tuple) else new

    if location.side == "in":
        handle = location.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = location.module.register_forward_hook(after)
    with handle:
        yield


@cache
@torch.no_grad()
def read(name: str) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The tensor at every site of a model, and transformers' own hidden states: one forward."""
    read: dict[str, Tensor] = {}
    handles = []
    for hookpoint in sites(name):
        # Cloned: Falcon adds attention's output to its MLP's in place.
        context = hooked(
            hookpoint.resolve(model(name)),
            lambda x, key=str(hookpoint): read.__setitem__(key, x.clone()),
        )
        context.__enter__()
        handles.append(context)
    output = model(name)(prompt(), output_hidden_states=True, use_cache=False)
    for context in handles:
        context.__exit__(None, None, None)
    return read, output.hidden_states


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """x times a weight, plus its bias, for nn.Linear and for GPT-2's transposed Conv1D."""
    weight: Any = module.weight
    x = x @ (weight if hasattr(module, "nx") else weight.T)
    return x if getattr(module, "bias", None) is None else x + module.bias


def normalise(module: nn.Module, x: Tensor) -> Tensor:
    """A norm by its formula: LayerNorm (Cohere has no bias, OLMo no weight), RMSNorm, Gemma's."""
    kind = type(module).__name__
    if "LayerNorm" in kind:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    else:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if weight is not None:
        x = x * (1 + weight if kind.startswith("Gemma") else weight)
    return x if bias is None else x + bias


def same(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(
        found.reshape(-1, found.shape[-1]),
        expected.reshape(-1, expected.shape[-1]),
        atol=tolerance,
        rtol=tolerance,
    )


def maybe(block: nn.Module, norm: str | None, x: Tensor) -> Tensor:
    return x if norm is None else normalise(attrgetter(norm)(block), x)


# ------------------------------------------------------------------ what the sites hold


def test_the_tables_cover_every_architecture() -> None:
    assert set(MODELS) == set(ARCHITECTURES)
    assert {name for name, _ in REFUSED} <= set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_residual_sites_are_the_hidden_states(name: str) -> None:
    tensors, hidden_states = read(name)
    _, final, _ = MODELS[name]
    last = f"resid_post.{LAYERS - 1}"
    if name == "mamba":  # records after each block, not before it, and then after the final norm
        hidden_states = (tensors["embed"], *hidden_states[: LAYERS - 1], hidden_states[-1])
    for layer in range(LAYERS):
        same(tensors[f"resid_pre.{layer}"], hidden_states[layer], 0)
        if layer + 1 < LAYERS:
            same(tensors[f"resid_post.{layer}"], hidden_states[layer + 1], 0)
    end = attrgetter(final)(model(name))
    by_hand = linear if isinstance(end, nn.Linear) else normalise
    same(by_hand(end, tensors[last]), hidden_states[-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_embed_is_the_embedding(name: str) -> None:
    weight = attrgetter(MODELS[name][2])(model(name)).weight
    same(read(name)[0]["embed"], weight[prompt()] * EMBEDDING_SCALE.get(name, 1.0), 1e-6)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mamba"])
@torch.no_grad()
def test_the_block_equations_hold(name: str) -> None:
    """Each site from the one before, by hand; both ends of the chain are hidden states."""
    tensors, hidden_states = read(name)
    spec, _, _ = MODELS[name]
    for layer, block in enumerate(blocks(model(name))[1]):
        at = {site: tensors.get(f"{site}.{layer}") for site in SITES}
        pre = hidden_states[layer]
        assert at["attn_z"] is not None and at["attn_out"] is not None and at["mlp_out"] is not None
        assert at["mlp_in"] is not None

        attention = linear(attrgetter(spec.out)(block), at["attn_z"])
        attention = maybe(block, spec.after[0], attention)
        same(at["attn_out"], attention)

        if name == "bloom_post_norm":
            mid = maybe(block, spec.stream_norms[0], pre) + attention
        else:
            mid = pre + spec.multiplier * attention
        if name == "opt_post_norm":
            mid = maybe(block, spec.stream_norms[0], mid)
        if at["resid_mid"] is not None:
            same(at["resid_mid"], mid)

        mlp_in = maybe(block, spec.norm, pre if spec.parallel else mid)
        same(at["mlp_in"], mlp_in)
        mlp_out = maybe(block, spec.after[1], run_mlp(name, spec, block, mlp_in))
        same(at["mlp_out"], mlp_out)
        if at["mlp_act"] is not None:
            down = linear(attrgetter(spec.down)(block), at["mlp_act"])
            same(at["mlp_out"], maybe(block, spec.after[1], down))

        if name == "bloom_post_norm":
            mid = maybe(block, spec.stream_norms[1], mid)
        post = mid + spec.multiplier * mlp_out.reshape(mid.shape)
        if name == "opt_post_norm":
            post = maybe(block, spec.stream_norms[1], post)
        same(tensors[f"resid_post.{layer}"], post, 5e-5)


def run_mlp(name: str, spec: Block, block: nn.Module, x: Tensor) -> Tensor:
    if name.startswith("opt"):
        first: Any = block.fc1
        return linear(attrgetter(spec.down)(block), linear(first, x).relu())
    mlp = attrgetter(spec.mlp)(block)
    out = mlp(x, torch.zeros_like(x)) if name.startswith("bloom") else mlp(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_exist_or_are_refused_with_the_reason(name: str) -> None:
    for layer in range(LAYERS):
        for site in SITES[1:]:
            layers, reason = REFUSED.get((name, site), (set(), ""))
            hookpoint = Hookpoint(site=site, layer=layer)
            if layer not in layers:
                hookpoint.resolve(model(name))
                continue
            with pytest.raises(HookpointError, match=reason) as error:
                hookpoint.resolve(model(name))
            offered = str(error.value).partition(f"Layer {layer} has ")[2].split(", ")
            assert offered == [s.site for s in sites(name) if s.layer == layer]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_width_and_shape(name: str) -> None:
    for hookpoint in sites(name):
        location = hookpoint.resolve(model(name))
        tensor = read(name)[0][str(hookpoint)]
        assert location.width == tensor.shape[-1], hookpoint
        assert model(name).get_submodule(location.path) is location.module
        sparse = (name, str(hookpoint)) == ("llama4_text", "mlp_out.1")
        flat = (name, hookpoint.site) in FLAT or sparse
        assert tensor.shape[:-1] == ((BATCH * TOKENS,) if flat else (BATCH, TOKENS)), hookpoint


# ------------------------------------------------------------------ what editing a site does


@cache
def delta() -> Tensor:
    return torch.randn(BATCH, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def edited(name: str, *edits: tuple[Location, float]) -> Tensor:
    """Logits with `factor * delta` added at each location."""
    with torch.no_grad():
        contexts = [
            hooked(location, lambda x, f=factor: x + f * delta().reshape(x.shape))
            for location, factor in edits
        ]
        for context in contexts:
            context.__enter__()
        logits: Tensor = model(name)(prompt(), use_cache=False).logits
        for context in contexts:
            context.__exit__(None, None, None)
    return logits


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if (n, "resid_mid") not in REFUSED])
def test_editing_resid_mid_moves_the_stream(name: str, layer: int) -> None:
    network, scale = model(name), 1 / MODELS[name][0].multiplier
    mid = Hookpoint(site="resid_mid", layer=layer).resolve(network)
    post = Hookpoint(site="resid_post", layer=layer).resolve(network)
    attention = Hookpoint(site="attn_out", layer=layer).resolve(network)
    assert mid.carry == post.path
    moved = edited(name, (mid, 1.0), (post, 1.0))
    same(moved, edited(name, (attention, scale)), 1e-4)
    # and the carry is not idle
    assert (moved - edited(name, (mid, 1.0))).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("mamba", "opt_post_norm")])
def test_editing_a_contribution_moves_the_block_output(name: str) -> None:
    network, (spec, _, _) = model(name), MODELS[name]
    parts = ["mlp_out", "attn_out"] if spec.parallel else ["mlp_out"]
    for layer in (1, LAYERS - 1):
        post = Hookpoint(site="resid_post", layer=layer).resolve(network)
        for part in parts:
            location = Hookpoint(site=part, layer=layer).resolve(network)
            scale = 1 / spec.multiplier
            same(edited(name, (location, scale)), edited(name, (post, 1.0)), 1e-4)


def test_locations_are_equal_when_they_are_the_same_edit() -> None:
    network = model("gpt2")

    def at(spelling: str) -> Location:
        return Hookpoint.parse(spelling).resolve(network)

    assert (
        at("resid_post.1") == at("transformer.h.1") == at("h.1") == at("blocks.1.hook_resid_post")
    )
    assert at("resid_pre.1") == at("h.1:in") != at("resid_post.1")
    assert len({at("mlp_out.1"), at("h.1.mlp"), at("h.1.mlp:out"), at("mlp_in.1")}) == 2
    # The norm's input alone does not carry the edit past the MLP.
    assert at("resid_mid.1") != at("h.1.ln_2:in")
    assert at("h.1.ln_2:in").carry is None


# ------------------------------------------------------------------ spellings

SPELLINGS = {
    "embed": "embed",
    "hook_embed": "embed",
    **{f"{site}.6": f"{site}.6" for site in SITES[1:]},
    "blocks.6.hook_resid_pre": "resid_pre.6",
    "blocks.6.hook_resid_mid": "resid_mid.6",
    "blocks.6.hook_resid_post": "resid_post.6",
    "blocks.6.hook_attn_out": "attn_out.6",
    "blocks.6.attn.hook_z": "attn_z.6",
    "blocks.6.hook_mlp_out": "mlp_out.6",
    "blocks.6.mlp.hook_in": "mlp_in.6",
    "blocks.6.mlp.hook_post": "mlp_act.6",
    "h.6": "h.6",
    "h.0.attn": "h.0.attn",
    "layers.6.mlp": "layers.6.mlp",
    "embed_tokens": "embed_tokens",
    "transformer.h.6": "transformer.h.6",
    "transformer.h.6:out": "transformer.h.6",
    "transformer.h.6:in": "transformer.h.6:in",
    "blocks.6": "blocks.6",  # MPT has such a list
    "blocks.6.hook_resid_post:out": "blocks.6.hook_resid_post:out",  # a HookedTransformer's module
    "embed:out": "embed:out",  # a module called embed
    "mlp_out.proj": "mlp_out.proj:out",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    hookpoint = Hookpoint.parse(spelling)
    assert str(hookpoint) == SPELLINGS[spelling]
    assert Hookpoint.parse(str(hookpoint)) == hookpoint == Hookpoint.parse(hookpoint)
    assert hash(hookpoint) == hash(Hookpoint.parse(str(hookpoint)))


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("", "names nothing"),
        ("resid_post", r"needs a layer: write resid_post\.0"),
        ("embed.3", "embed has no layer"),
        ("resid_post.-1", "layers count from 0"),
        ("resid_pots.6", r"did you mean resid_post\.6"),
        ("resid-mid.6", r"did you mean resid_mid\.6"),
        ("resid_post.6:in", "has no side; drop :in"),
        ("transformer.h.6:input", "expected :in or :out"),
        ("transformer.h.6:", "expected :in or :out"),
        ("blocks.6.hook_mlp_in", r"resid_mid\.6 or mlp_in\.6"),
        ("blocks.6.ln2.hook_normalized", r"before it is multiplied.*mlp_in\.6"),
        ("blocks.6.hook_resid_pos", r"nearest: blocks\.6\.hook_resid_post"),
        ("blocks.6.attn.hook_q", r"nearest: blocks\.6\.attn\.hook_z"),
        ("hook_pos_embed", "nearest: hook_embed"),
        ("blocks.x.hook_resid_post", "no TransformerLens name saert knows"),
    ],
)
def test_refused_spellings(spelling: str, message: str) -> None:
    with pytest.raises(HookpointError, match=message):
        Hookpoint.parse(spelling)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"site": "embed", "path": "h.0"},
        {"site": "resid_psot", "layer": 1},
        {"site": "resid_post", "layer": 1, "side": "in"},
        {"path": "h.0"},
        {"path": "h.0", "side": "out", "layer": 0},
        {"path": "", "side": "out"},
    ],
)
def test_malformed_hookpoints_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(HookpointError):
        Hookpoint(**fields)


# ------------------------------------------------------------------ finding the blocks


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("resid_post.3", r"no resid_post\.3: gpt2 has layers 0 to 2"),
        ("transformer.h.3", r"nearest: transformer\.h\."),
        (
            "transfomer.h.1.mlp",
            r"no module 'transfomer\.h\.1\.mlp' .* nearest: transformer\.h\.1\.mlp",
        ),
        ("h.3", r"nearest: h\.\d"),
        ("zzz", "it has transformer, lm_head"),
        ("transformer.h", r"a ModuleList is never called; name a module in it: transformer\.h\.0"),
    ],
)
def test_what_a_model_does_not_have(spelling: str, message: str) -> None:
    with pytest.raises(HookpointError, match=message):
        Hookpoint.parse(spelling).resolve(model("gpt2"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bare_backbone_has_the_same_modules(name: str) -> None:
    whole = model(name)
    bare = whole.get_submodule(whole.base_model_prefix) if name != "llama4_text" else whole.model
    for hookpoint in sites(name):
        inside, outside = hookpoint.resolve(bare), hookpoint.resolve(whole)
        assert inside.module is outside.module and inside.side == outside.side
        assert outside.path.endswith(inside.path)


def test_an_automodel_is_a_backbone() -> None:
    bare = AutoModel.from_config(model("opt").config)
    assert blocks(bare)[0] == "decoder.layers"
    assert Hookpoint.parse("layers.1").resolve(bare) == Hookpoint.parse("resid_post.1").resolve(
        bare
    )


@pytest.mark.parametrize(("name", "owner"), [("gpt2", "transformer"), ("opt", "model.decoder")])
def test_backbone(name: str, owner: str) -> None:
    assert backbone(model(name)) == (owner, attrgetter(owner)(model(name)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "opt", "gemma2"])
def test_peft_and_compile_wrappers_keep_every_site(name: str) -> None:
    network = tiny(name)
    plain = {h: h.resolve(network) for h in sites(name)}
    path = Hookpoint.parse(plain[Hookpoint(site="mlp_out", layer=1)].path)
    compiled = torch.compile(network)
    assert unwrap(compiled) == ("_orig_mod", network)
    for hookpoint, location in plain.items():
        assert hookpoint.resolve(compiled).module is location.module
    assert path.resolve(compiled) == Hookpoint.parse("mlp_out.1").resolve(compiled)

    wrapped = peft_wrap(network)  # puts LoRA around the linears, in place
    assert unwrap(wrapped) == ("base_model.model", network)
    for hookpoint, location in plain.items():
        found = hookpoint.resolve(wrapped)
        assert found.path == f"base_model.model.{location.path}"
        assert (found.side, found.width) == (location.side, location.width)
    assert path.resolve(wrapped) == Hookpoint.parse("mlp_out.1").resolve(wrapped)
    both = Hookpoint.parse("resid_mid.1").resolve(torch.compile(wrapped))
    assert both.carry == f"_orig_mod.base_model.model.{blocks(network)[0]}.1"


def test_prompt_tuning_wraps_without_a_tuner() -> None:
    import peft

    network = tiny("gpt2")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(network, config)
    assert unwrap(wrapped) == ("base_model", network)
    location = Hookpoint.parse("resid_post.1").resolve(wrapped)
    assert location == Hookpoint.parse("h.1").resolve(wrapped)
    assert location.module is network.transformer.h[1]


def test_separately_compiled_blocks() -> None:
    network = tiny("llama")
    inner = network.model.layers[1]
    network.model.layers[1] = torch.compile(inner)
    mlp = Hookpoint.parse("mlp_act.1").resolve(network)
    assert mlp.path == "model.layers.1._orig_mod.mlp.down_proj"
    assert mlp.module is inner.mlp.down_proj
    assert Hookpoint.parse("resid_post.1").resolve(network).path == "model.layers.1"


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_multimodal_models_use_their_text_part(name: str) -> None:
    """The vision tower is as deep, so only its own config tells the two lists apart."""
    network = tiny_multimodal(name)
    assert blocks(network)[0] == "model.language_model.layers"
    text = network.model.language_model
    assert Hookpoint.parse("embed").resolve(network).module is text.embed_tokens
    for spelling in ("resid_post.1", "layers.1", "language_model.layers.1"):
        assert Hookpoint.parse(spelling).resolve(network).module is text.layers[1]


def test_a_plain_module_has_paths_and_no_sites() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    location = Hookpoint.parse("2:in").resolve(plain)
    assert (location.module, location.side, location.width) == (plain[2], "in", 8)
    assert Hookpoint.parse("0").resolve(plain).width == 8
    assert Hookpoint.parse("1").resolve(plain).width is None
    with pytest.raises(HookpointError, match="no transformers config.*path"):
        Hookpoint.parse("resid_post.0").resolve(plain)


def test_blocks_of_an_unverified_layout_keep_the_sites_that_need_none() -> None:
    network = tiny("llama")
    network.model.layers[1].shared_mlp = nn.Linear(HIDDEN, HIDDEN)  # as GraniteMoeShared has it
    for site in ("resid_mid", "attn_out", "mlp_out"):
        with pytest.raises(HookpointError, match="not verified .* given its shared_mlp") as error:
            Hookpoint(site=site, layer=1).resolve(network)
        assert "Layer 1 has resid_pre, resid_post, attn_z, mlp_in, mlp_act" in str(error.value)


def test_an_encoder_decoder_is_ambiguous() -> None:
    import transformers

    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=8,
        decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(HookpointError, match=r"found encoder\.layers \(2\), decoder\.layers \(2\)"):
        blocks(transformers.BartModel(config))
