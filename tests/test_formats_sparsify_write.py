"""Writing sparsify's layout: what it can compute, bit for bit; the rest refused; its folders."""

import json
from typing import Any

import pytest
import torch
from sae_cases import D_IN, LATENTS, K, inputs, make
from safetensors.torch import load_file
from tiny_models import peft_wrap, tiny

from saert.activations import AbsTopK, GroupMax, TopK
from saert.hub.format import save
from saert.hub.formats.sparsify_write import folder_name
from saert.hub.load import load
from saert.sae import SAE

KEYS = [  # as eai-sparsify 1.3.3 writes them
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
    "skip_connection", "transcode", "d_in",
]  # fmt: skip


def sae(activation: Any = None, **options: Any) -> SAE:
    """The weights of a case, as wide as they are read, with anything else changed."""
    base = make("topk", kind="sae_skip", dtype=options.pop("dtype", torch.float32))
    skip = base.W_skip if options.pop("skip", False) else None
    settings = dict(activation=activation or TopK(K), hookpoint="layers.2", W_skip=skip) | options
    return SAE.from_weights(base.W_enc, base.W_dec, base.b_enc, base.b_dec, **settings)


TRANSCODER = dict(hookpoint="layers.2.mlp:in", target_hookpoint="layers.2.mlp")
EXPRESSIBLE = {
    "topk": dict(),
    "bfloat16": dict(dtype=torch.bfloat16),
    "groupmax": dict(activation=GroupMax(4)),
    "skip": dict(skip=True),
    "transcoder": TRANSCODER,
    "skip transcoder": TRANSCODER | dict(skip=True, activation=GroupMax(4)),
}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_save_and_load_are_the_identity(tmp_path, name):
    before = sae(**EXPRESSIBLE[name])
    folder = str(before.target_hookpoint or before.hookpoint)
    save(before, tmp_path / folder, format="sparsify")
    after = load(tmp_path, folder)
    assert (after.hookpoint, after.target_hookpoint) == (before.hookpoint, before.target_hookpoint)
    assert after.subtract_b_dec == before.subtract_b_dec
    assert repr(after.activation) == repr(before.activation)
    for one, two in zip(before.parameters(), after.parameters(), strict=True):
        assert one.dtype == two.dtype
        assert one.equal(two)


def test_only_what_sparsify_writes_is_written(tmp_path):
    save(sae(skip=True, **TRANSCODER), tmp_path, format="sparsify")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]
    config = json.loads((tmp_path / "cfg.json").read_text())
    values = ["topk", 2, False, LATENTS, K, False, True, True, D_IN]
    assert list(config.items()) == list(zip(KEYS, values, strict=True))
    assert set(load_file(tmp_path / "sae.safetensors")) == {
        "encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip",
    }  # fmt: skip


@pytest.mark.parametrize("where", [dict(), TRANSCODER])
def test_the_other_use_of_b_dec_is_folded_into_the_bias(tmp_path, where):
    odd = sae(**where, subtract_b_dec=bool(where))
    save(odd, tmp_path / "layers.2.mlp", format="sparsify")
    folded = load(tmp_path)
    assert folded.subtract_b_dec != odd.subtract_b_dec
    x = inputs(40, dtype=torch.float32)
    latents, found = odd.encode(x).to_dense(), folded.encode(x).to_dense()
    assert (found != 0).equal(latents != 0)
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(folded(x), odd(x), rtol=0, atol=1e-5)


def test_biases_that_are_missing_are_written_as_zeros(tmp_path):
    bare = SAE.from_weights(sae().W_enc, sae().W_dec, activation=TopK(K))
    save(bare, tmp_path, format="sparsify")
    x = inputs(9, dtype=torch.float32)
    assert load(tmp_path)(x).equal(bare(x))


@pytest.mark.parametrize("unit", [True, False])
def test_the_training_flag_follows_the_decoder(tmp_path, unit):
    one = sae()
    if unit:
        one.W_dec.data /= one.W_dec.norm(dim=-1, keepdim=True)
    save(one, tmp_path, format="sparsify")
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_decoder"] is unit


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: make("jumprelu"), "TopK and GroupMax, and no JumpReLU"),
        (lambda: make("gated"), "no Gated"),
        (lambda: make("relu"), "no ReLU"),
        (lambda: make("batchtopk"), "no BatchTopK"),
        (lambda: sae(AbsTopK(K)), "no AbsTopK"),
        (lambda: make("topk", "layer_norm"), "input transforms; this SAE has LayerNorm"),
        (lambda: sae(select_by_decoder_norm=True), "select by decoder norm"),
        (lambda: make("topk", kind="transcoder"), "the width it reads, here 10, and not 7"),
        (lambda: sae(hookpoint="resid_mid.2"), "output of one module, which resid_mid.2 is not"),
        (lambda: sae(hookpoint="layers.2:in"), "which layers.2:in is not"),
        (
            lambda: sae(hookpoint="resid_mid.2", target_hookpoint="mlp_out.2"),
            "input to its output, not resid_mid.2 to mlp_out.2",
        ),
        (lambda: sae(hookpoint="mlp_in.1", target_hookpoint="mlp_out.2"), "not mlp_in.1"),
    ],
)
def test_what_sparsify_lacks_is_named(tmp_path, made, match):
    with pytest.raises(ValueError, match=match) as caught:
        save(made(), tmp_path / "new", format="sparsify")
    assert "format='saelens' can hold this SAE" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_fold_that_half_precision_would_round_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"b_dec.*torch.bfloat16.*\.to\(torch.float32\) first"):
        save(sae(dtype=torch.bfloat16, subtract_b_dec=False), tmp_path, format="sparsify")


# -- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["model", "model_type"])
@pytest.mark.parametrize(
    ("family", "hookpoint", "target", "folder"),
    [
        ("gpt2", "resid_post.1", None, "h.1"),
        ("gpt2", "transformer.h.1.attn", None, "h.1.attn"),
        ("gpt2", "embed", None, "wte"),
        ("llama", "mlp_out.1", None, "layers.1.mlp"),
        ("llama", "mlp_in.1", "mlp_out.1", "layers.1.mlp"),
        ("llama", "layers.0.mlp:in", "layers.0.mlp", "layers.0.mlp"),
        ("llama", "resid_pre.1", "resid_post.1", "layers.1"),
        ("gpt_neox", "attn_out.0", None, "layers.0.attention"),
        ("gemma2", "mlp_out.0", None, "layers.0.post_feedforward_layernorm"),
    ],
)
def test_sparsify_s_folder_is_the_module_s_path_in_the_base_model(
    by, family, hookpoint, target, folder
):
    model = family if by == "model_type" else tiny(family)
    assert folder_name(hookpoint, model, target) == folder


@pytest.mark.parametrize(
    ("model", "hookpoint", "target", "match"),
    [
        ("llama", "resid_pre.1", None, "output of one module, which resid_pre.1 is not"),
        ("llama", "attn_z.1", None, "which attn_z.1 is not"),
        ("gemma2", "mlp_in.1", "mlp_out.1", "not mlp_in.1 to mlp_out.1"),
        ("llama", "mlp_in.1", "mlp_out.2", "not mlp_in.1 to mlp_out.2"),
        ("llama", "layers.1.nlp", None, "nearest: layers.1.mlp"),
        ("no_such_model", "resid_post.1", None, "model_type 'no_such_model'.*pass the model"),
    ],
)
def test_places_that_sparsify_has_no_name_for(model, hookpoint, target, match):
    with pytest.raises(ValueError, match=match):
        folder_name(hookpoint, model, target)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_wrapper_or_a_bare_backbone_changes_no_folder(family):
    model = tiny(family)
    for one in (model.base_model, torch.compile(model), peft_wrap(model)):
        assert folder_name("resid_post.1", one) == folder_name("resid_post.1", family)


def test_a_config_that_describes_every_layer_keeps_its_own_depth():
    assert folder_name("resid_post.3", "gpt_neo") == "h.3"
