"""Checkpoints: written and read back bit for bit, read as their makers meant, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_cases
import torch
from sae_cases import D_IN, KINDS, LATENTS, RANKED, TRANSFORMS, inputs, make
from safetensors.torch import load_file, save_file

from saert.activations import BatchTopK, JumpReLU
from saert.hub.format import FormatError, save
from saert.hub.formats.saelens import CONFIG, RESCALE, WEIGHTS
from saert.hub.load import load
from saert.model_names import ALIASES, hub_id
from saert.pursuit import MatchingPursuit
from saert.sae import SAE

ACTIVATIONS = [*sae_cases.ACTIVATIONS, *RANKED]

# -- round trip ----------------------------------------------------------------------------------


def same_numbers(a: SAE, b: SAE) -> None:
    assert a.subtract_b_dec == b.subtract_b_dec
    assert a.input_transform == b.input_transform
    assert a.select_by_decoder_norm == b.select_by_decoder_norm
    assert (a.hookpoint, a.target_hookpoint) == (b.hookpoint, b.target_hookpoint)
    assert a.is_transcoder == b.is_transcoder
    assert type(a.activation) is type(b.activation)
    if not dict(a.activation.named_buffers()):  # k, and whatever else is no tensor
        assert repr(a.activation) == repr(b.activation)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        mine, theirs = getattr(a, name), getattr(b, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype, name
            assert mine.equal(theirs), name
    for name, value in a.activation.named_buffers():
        theirs = b.activation.get_buffer(name)
        assert value.dtype == theirs.dtype
        assert theirs.equal(value.expand_as(theirs)), name
    x = inputs(4, dtype=a.dtype)
    assert a(x).equal(b(x))
    assert a.encode(x).to_dense().equal(b.encode(x).to_dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_save_and_load_are_the_identity(tmp_path, act, transform, kind):
    own = {"subtract_b_dec": False} if kind == "transcoder_square" else {}
    sae = make(act, transform, kind, dtype=torch.float32, **own)
    save(sae, tmp_path / "sae")
    same_numbers(sae, load(tmp_path, "sae"))


@pytest.mark.parametrize("act", ["relu", "topk"])  # SAELens' words, and our own
def test_a_transcoder_that_subtracts_b_dec_survives(tmp_path, act):
    sae = make(act, kind="transcoder_square", dtype=torch.float32)
    assert sae.subtract_b_dec
    save(sae, tmp_path)
    same_numbers(sae, load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tmp_path, dtype):
    sae = make("jumprelu", "layer_norm", dtype=dtype)
    save(sae, tmp_path)
    assert load(tmp_path).dtype == dtype
    same_numbers(sae, load(tmp_path))
    wide = load(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {wide.activation.threshold.dtype}
    assert wide.W_enc.equal(sae.W_enc.double())


@pytest.mark.parametrize("act", ["topk", "jumprelu"])
def test_selection_by_decoder_norm_survives(tmp_path, act):
    sae = make(act, select_by_decoder_norm=True, dtype=torch.float32)
    save(sae, tmp_path)
    same_numbers(sae, load(tmp_path))


@pytest.mark.parametrize(
    "hookpoint", ["resid_pre.3", "mlp_out.0", "attn_z.2", "transformer.h.1:in"]
)
def test_hookpoint_and_metadata_survive(tmp_path, hookpoint):
    metadata = {"base_model": "gpt2", "dataset": "Ünïcode", "training": {"tokens": 5}}
    sae = make("topk", hookpoint=hookpoint, metadata=metadata, dtype=torch.float32)
    save(sae, tmp_path)
    loaded = load(tmp_path)
    assert loaded.hookpoint == sae.hookpoint
    assert metadata.items() <= loaded.metadata.items()
    assert sae.metadata == metadata
    save(loaded, tmp_path / "again")
    assert load(tmp_path / "again").metadata == loaded.metadata


def test_an_sae_without_biases_survives(tmp_path):
    W = torch.randn(LATENTS, D_IN)
    sae = SAE.from_weights(W, W, activation=JumpReLU(0.3), hookpoint="resid_post.0")
    save(sae, tmp_path)
    x = inputs(4, dtype=torch.float32)
    assert load(tmp_path)(x).equal(sae(x))


def test_what_saelens_can_express_is_written_in_its_words(tmp_path):
    save(make("topk", "layer_norm", dtype=torch.float32), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["architecture"] == "topk"
    assert (config["d_in"], config["d_sae"], config["k"]) == (D_IN, LATENTS, 5)
    assert (config["normalize_activations"], config["dtype"]) == ("layer_norm", "float32")
    assert config["apply_b_dec_to_input"] is True
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items()}
    assert shapes == {
        "W_enc": [D_IN, LATENTS], "W_dec": [LATENTS, D_IN], "b_enc": [LATENTS], "b_dec": [D_IN],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("act", "transform", "kind"),
    [
        ("topk", "none", "transcoder"),
        ("abstopk", "none", "transcoder"),
        ("relu", "mean_centre", "sae"),
        ("relu", "none", "sae_skip"),
        ("groupmax", "none", "sae"),
    ],
)
def test_what_saelens_cannot_express_is_written_so_that_it_refuses(tmp_path, act, transform, kind):
    save(make(act, transform, kind, dtype=torch.float32), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["architecture"] == "saert"


def pursuit_sae(tied: bool = True, subtract: bool = True, **options: Any) -> SAE:
    W = torch.nn.functional.normalize(torch.randn(2, LATENTS, D_IN), dim=-1)
    return SAE.from_weights(
        W[0], W[0] if tied else W[1], None, torch.randn(D_IN) * 0.3,
        activation=MatchingPursuit(**options), subtract_b_dec=subtract,
        hookpoint="resid_post.0",
    )  # fmt: skip


@pytest.mark.parametrize(("tied", "subtract"), [(True, True), (False, True), (True, False)])
def test_matching_pursuit_survives_in_saelens_words_where_it_has_them(tmp_path, tied, subtract):
    sae = pursuit_sae(tied, subtract, max_iterations=4, residual_threshold=0.125)
    save(sae, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    theirs = tied and subtract  # without it, SAELens leaves b_dec out of the output too
    assert config["architecture"] == ("matching_pursuit" if theirs else "saert")
    if theirs:
        assert load_file(tmp_path / WEIGHTS).keys() == {"W_dec", "b_dec"}
        assert config["residual_threshold"] == 0.125
    same_numbers(sae, load(tmp_path))


def test_matching_pursuit_that_does_not_subtract_b_dec_does_not_add_it(tmp_path):
    sae, x = pursuit_sae(), inputs(6, dtype=torch.float32)
    save(sae, tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(apply_b_dec_to_input=False))
    sae.subtract_b_dec, sae.b_dec = False, None
    assert load(tmp_path)(x).equal(sae(x))


def test_an_unknown_format_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'gguf', expected 'saelens'"):
        save(make(), tmp_path / "new", format="gguf")
    assert not (tmp_path / "new").exists()


# -- other people's files ------------------------------------------------------------------------

CASES = [
    "legacy_gpt2_res_jb",
    "saelens_gated",
    "saelens_jumprelu",
    "saelens_standard",
    "saelens_standard_layer_norm",
    "saelens_topk",
    "saelens_transcoder",
]


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["stored", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_saelens_checkpoints_give_what_saelens_gives(shared, name, dtype):
    folder = shared / "cases" / name
    case = json.loads((folder / "case.json").read_text())
    sae = load(folder / "repo", case["path"], dtype=dtype)
    expected = load_file(folder / "expected.safetensors")
    found = {"latents": sae.encode(expected["x"]).to_dense(), "recon": sae(expected["x"])}
    assert (found["latents"] != 0).equal(expected["latents"] != 0)
    for key, value in found.items():
        within = 1e-4 * expected[key].abs().max().item()
        torch.testing.assert_close(value, expected[key], rtol=0, atol=within)
    assert sae.is_transcoder == (case.get("kind") == "transcoder")
    facts = {"base_model": "gpt2", "dataset": "Skylion007/openwebtext", "context_size": 128}
    assert facts.items() <= sae.metadata.items()
    where = {"legacy_gpt2_res_jb": "resid_pre.6", "saelens_transcoder": "None"}
    assert str(sae.hookpoint) == where.get(name, "resid_post.6")


def test_every_saelens_case_is_tested(shared):
    files = (shared / "cases").glob("*/case.json")
    theirs = [path.parent.name for path in files if '"family": "saelens"' in path.read_text()]
    assert sorted(theirs) == CASES


def test_stored_bfloat16_is_kept_by_default(shared):
    sae = load(shared / "cases" / "saelens_gated" / "repo", "blocks.6.hook_resid_post")
    assert {p.dtype for p in sae.parameters()} == {torch.bfloat16}


def rewrite(
    folder: Path,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> None:
    """Change a saved checkpoint in place."""
    if config is not None:
        data = json.loads((folder / CONFIG).read_text())
        config(data)
        (folder / CONFIG).write_text(json.dumps(data))
    if tensors is not None:
        data = load_file(folder / WEIGHTS)
        tensors(data)
        save_file(data, folder / WEIGHTS)


def test_batchtopk_is_known_from_how_it_was_trained(tmp_path):
    save(make("batchtopk", dtype=torch.float32), tmp_path)
    assert isinstance(load(tmp_path).activation, BatchTopK)
    rewrite(tmp_path, config=lambda c: c["metadata"].pop("training_architecture"))
    assert type(load(tmp_path).activation) is JumpReLU


@pytest.mark.parametrize("act", ["topk", "abstopk"])
def test_rescaling_by_decoder_norm_is_folded_into_the_weights(tmp_path, act):
    # FORMATS section 2: top-k on pre·‖W_dec‖, latents keep the factor, decode divides it out
    sae, x = make(act, kind="sae_plain"), inputs(6)
    sae.W_dec.data[3] = 0  # a latent that was never used: SAELens would divide by zero
    save(sae, tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(rescale_acts_by_decoder_norm=True))
    norm = sae.W_dec.norm(dim=-1)
    score = (x @ sae.W_enc.T + sae.b_enc) * norm
    top = (score if act == "topk" else score.abs()).topk(5).indices
    kept = score.gather(-1, top) if act == "abstopk" else score.gather(-1, top).relu()
    kept = torch.zeros_like(score).scatter(-1, top, kept)
    loaded = load(tmp_path)
    torch.testing.assert_close(loaded.encode(x).to_dense(), kept)
    norm[3] = 1
    torch.testing.assert_close(loaded(x), (kept / norm) @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_folded_is_folded_before_it_is_rounded(tmp_path, dtype):
    sae = make("topk", kind="sae_plain", dtype=torch.float64)
    save(sae, tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(rescale_acts_by_decoder_norm=True))
    loaded = load(tmp_path, dtype=dtype)
    norm = sae.W_dec.norm(dim=-1, keepdim=True)
    assert loaded.dtype == dtype
    torch.testing.assert_close(loaded.W_enc, (sae.W_enc * norm).to(dtype), atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["transcoder", "transcoder_skip"])
@pytest.mark.parametrize("act", ["relu", "jumprelu"])
def test_transcoders_are_written_and_read_by_saelens_four_names(tmp_path, act, kind):
    sae, x = make(act, kind=kind, dtype=torch.float32), inputs(5, dtype=torch.float32)
    save(sae, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    name = {"relu": "", "jumprelu": "jumprelu_"}[act]
    name += "skip_transcoder" if sae.W_skip is not None else "transcoder"
    assert (config["architecture"], config["d_out"]) == (name, sae_cases.D_OUT)
    dense = sae_cases.latents(sae, x)
    torch.testing.assert_close(
        load(tmp_path)(x).double(), sae_cases.reconstruct(sae, dense, x), atol=1e-4, rtol=1e-4
    )


def test_a_scale_that_the_file_leaves_out_is_said_so(tmp_path):
    sae, x = make("relu", dtype=torch.float32), inputs(5, dtype=torch.float32)
    save(sae, tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(normalize_activations="expected_average_only_in"))
    with pytest.warns(UserWarning, match="scaled by one number, which the checkpoint does not"):
        loaded = load(tmp_path)
    assert loaded(x).equal(sae(x))


def test_attention_heads_are_read_side_by_side(tmp_path):
    """hook_z is [heads, head_dim] in TransformerLens, one row in transformers: no difference."""
    save(make("relu", dtype=torch.float32, hookpoint="attn_z.2"), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["reshape_activations"] == "hook_z"
    assert str(load(tmp_path).hookpoint) == "attn_z.2"
    rewrite(tmp_path, config=lambda c: c["metadata"].update(hook_head_index=3))
    assert load(tmp_path).hookpoint is None  # one head of them is no module's input


def test_transformers_own_name_is_used_where_transformer_lens_has_none(tmp_path):
    save(make("relu", kind="transcoder", dtype=torch.float32), tmp_path)
    names = {
        "hook_name": "blocks.3.hook_mlp_in",  # ambiguous: SAELens writes it for another tensor
        "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
        "hook_name_out": "somewhere.hook_else",
        "hf_hook_name_out": "model.layers.3.mlp.down_proj.input",
    }
    rewrite(tmp_path, config=lambda c: c["metadata"].update(names))
    sae = load(tmp_path)
    assert str(sae.hookpoint) == "mlp_in.3"
    assert str(sae.target_hookpoint) == "layers.3.mlp.down_proj:in"


UNDER_WAY = {  # what SAELens 6.54 writes of a run under way, and its inference classes skip
    "standard": {"l1_coefficient": 1.0, "lp_norm": 1.0, "l1_warm_up_steps": 0},
    "gated": {"l1_coefficient": 1.0, "l1_warm_up_steps": 0},
    "topk": {"use_sparse_activations": False, "aux_loss_coefficient": 1.0, RESCALE: False},
    "abstopk": {"use_sparse_activations": True, "aux_loss_coefficient": 1.0, RESCALE: False},
    "jumprelu": {
        "jumprelu_init_threshold": 0.01, "jumprelu_bandwidth": 0.05, "l0_coefficient": 1.0,
        "jumprelu_sparsity_loss_mode": "step", "l0_warm_up_steps": 0, "target_l0": None,
        "pre_act_loss_coefficient": None, "jumprelu_tanh_scale": 4.0,
        "jumprelu_ste_to_input": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", UNDER_WAY)
def test_a_checkpoint_of_a_run_under_way_is_read_as_its_inference(tmp_path, kind):
    sae, x = make(kind.replace("standard", "relu"), dtype=torch.float32), inputs(5)
    save(sae, tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(UNDER_WAY[kind], decoder_init_norm=0.1))
    assert load(tmp_path)(x.float()).equal(sae(x.float()))
    rewrite(tmp_path, config=lambda c: c.update(matryoshka_widths=[2, 4]))
    with pytest.raises(FormatError, match=r"unknown keys \['matryoshka_widths'\]"):
        load(tmp_path)


@pytest.mark.parametrize("centred", [True, False, None])
def test_a_centred_model_is_noted_and_nothing_else_changes(tmp_path, centred):
    sae, x = make("relu", dtype=torch.float32), inputs(5, dtype=torch.float32)
    save(sae, tmp_path)
    options = {} if centred is None else {"center_writing_weights": centred}
    rewrite(tmp_path, config=lambda c: c["metadata"].update(model_from_pretrained_kwargs=options))
    loaded = load(tmp_path)
    assert loaded.metadata.get("reads_centred", False) is (centred is True)
    assert loaded(x).equal(sae(x))


def test_model_names_are_hub_ids():
    assert hub_id("gpt2-small") == "gpt2"
    assert hub_id("Gemma-2b") == "google/gemma-2b"
    assert hub_id("pythia-70m-deduped") == "EleutherAI/pythia-70m-deduped"
    assert hub_id("pythia-125m") == "EleutherAI/pythia-160m"
    assert hub_id("someone/gpt2-small") == "someone/gpt2-small"
    assert hub_id("gelu-1l") == "gelu-1l"
    assert all(alias == alias.lower() for alias in ALIASES)


def test_files_beside_the_weights_are_not_asked_for(tmp_path):
    save(make(dtype=torch.float32), tmp_path)
    (tmp_path / "sparsity.safetensors").write_bytes(b"not even a file of its kind")
    (tmp_path / "README.md").write_text("hello")
    load(tmp_path)


def test_a_hook_that_no_module_answers_to_is_left_to_attach(tmp_path):
    save(make(dtype=torch.float32), tmp_path)
    rewrite(
        tmp_path, config=lambda c: c["metadata"].update(hook_name="blocks.0.ln2.hook_normalized")
    )
    sae = load(tmp_path)
    assert sae.hookpoint is None
    assert sae.metadata["hook_name"] == "blocks.0.ln2.hook_normalized"


def test_a_transcoder_without_the_name_of_its_target_is_refused(tmp_path):
    """A square one could pass for an SAE, and have its output scaled back."""
    save(make("relu", "layer_norm", "transcoder_square", subtract_b_dec=False), tmp_path)
    rewrite(tmp_path, config=lambda c: c["metadata"].pop("hook_name_out"))
    with pytest.raises(FormatError, match="hook_name_out"):
        load(tmp_path)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(sparsity_coefficient=3), r"unknown keys \['sparsity_coefficient'\]; ignoring"),
        (dict(k=5), r"unknown keys \['k'\]"),
        (dict(architecture="crosscoder"), "'crosscoder', expected one of abstopk, gated, jump"),
        (dict(architecture="temporal"), "'temporal'.*tokens before it.*encoder of sequences"),
        (dict(architecture="batchtopk"), "'batchtopk'.*training.*save_inference_model"),
        (dict(architecture="matching_pursuit"), r"unknown \['W_enc', 'b_enc', 'threshold'\]"),
        (dict(architecture=None), "architecture None, expected one of"),
        (dict(d_sae=LATENTS + 1), "declares d_sae = 25, but the tensors hold 24"),
        (dict(d_in=D_IN - 1), "declares d_in = 9, but the tensors hold 10"),
        (dict(d_sae="24"), "declares d_sae = '24', but the tensors hold 24"),
        (dict(metadata={"sae_lens_version": "5.10.2"}), "5.10.2.*expected sae_lens_version 6"),
        (dict(metadata={}), "no version.*expected sae_lens_version 6"),
        (dict(metadata=None), "no version.*expected sae_lens_version 6"),
        (
            dict(normalize_activations="batch"),
            r"normalize_activations 'batch', expected one of \['none', 'layer_norm', 'const",
        ),
        (dict(normalize_activations="mean_centre"), "normalize_activations 'mean_centre'"),
        (dict(normalize_activations="covariance_whitening"), "fold_activation_whitening"),
        (
            dict(reshape_activations="flat"),
            r"reshape_activations is 'flat', expected one of \['none', 'hook_z'\]",
        ),
        (dict(apply_b_dec_to_input="no"), r"apply_b_dec_to_input is 'no', expected one of \[True"),
        (dict(architecture="topk", k=5, rescale_acts_by_decoder_norm=1), "rescale.* is 1, expec"),
        (dict(architecture="topk", k=5), r"found tensors.*unknown \['threshold'\]"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_meant_are_named(tmp_path, config, match):
    save(make("jumprelu", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(config))
    with pytest.raises(FormatError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("key", ["d_in", "d_sae", "architecture"])
def test_missing_keys_are_named(tmp_path, key):
    save(make("jumprelu", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, config=lambda c: c.pop(key))
    with pytest.raises(FormatError, match=key):
        load(tmp_path)


@pytest.mark.parametrize("k", [None, "5", 2.5])
def test_k_is_an_integer(tmp_path, k):
    save(make("topk", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(k=k))
    with pytest.raises(FormatError, match="k is .*, expected an integer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("own", "match"),
    [
        (dict(activation="swish"), "found activation 'swish'.*expected one of"),
        (dict(signed=True), "signed"),
        (
            dict(k=3),
            r"keys \['W_skip', 'activation', 'input_transform', 'k', 'sel.*expected",
        ),
        (dict(input_transform={"kind": "whiten"}), "'whiten', expected one of"),
        (dict(input_transform={"kind": "unit_norm", "p": 1}), "unit_norm"),
        (dict(input_transform={"kind": "dataset_scale", "p": 1}), r"unknown options \['p'\]"),
    ],
    ids=str,
)
def test_our_own_extension_refuses_what_it_does_not_know(tmp_path, own, match):
    save(make("relu", "dataset_scale", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, config=lambda c: c["saert"].update(own))
    with pytest.raises(FormatError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1]", "found a list"), (b"", "not JSON")],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content, match):
    save(make(dtype=torch.float32), tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(FormatError, match=f"{CONFIG}: {match}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [dict(metadata=["6.0.0"]), dict(metadata="6.0.0"), dict(architecture=["topk"])],
    ids=str,
)
def test_config_values_of_another_type_are_named(tmp_path, config):
    save(make("jumprelu", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(config))
    with pytest.raises(FormatError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (lambda t: t.pop("b_enc"), r"found tensors \['W_dec', 'W_.*missing \['b_enc'\]"),
        (lambda t: t.pop("threshold"), r"missing \['threshold'\]"),
        (lambda t: t.pop("W_enc"), r"missing \['W_enc'\]"),
        (lambda t: t.update(log_threshold=torch.zeros(3)), "log_threshold"),
        (lambda t: t.update(W_skip=torch.zeros(D_IN, D_IN)), "W_skip"),
        (lambda t: t.update(W_enc=torch.zeros(5)), r"W_enc is \[5\], expected a matrix"),
        (
            lambda t: t.update(W_enc=t["W_enc"].T.contiguous()),
            "declares d_in = 10, but the tensors hold 24",
        ),
        (
            lambda t: t.update(W_dec=torch.zeros(LATENTS, 3)),
            r"W_dec is \[24, 3\], expected \[24, 10\]",
        ),
        (lambda t: t.update(W_dec=torch.zeros(LATENTS - 1, D_IN)), r"W_dec is \[23, 10\]"),
        (lambda t: t.update(b_enc=torch.zeros(3)), r"b_enc is \[3\], expected \[24\]"),
        (lambda t: t.update(threshold=torch.zeros(3)), r"threshold has shape \[3\]"),
        (lambda t: t["b_dec"].fill_(torch.nan), "b_dec contains NaN"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_config_are_named(tmp_path, tensors, match):
    save(make("jumprelu", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


def test_a_contradicting_shape_is_a_format_error(tmp_path):
    save(make("jumprelu", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, tensors=lambda t: t.update(b_enc=torch.zeros(3)))
    with pytest.raises(FormatError, match=tmp_path.name):
        load(tmp_path)


def test_tensors_of_two_dtypes_are_refused(tmp_path):
    save(make("jumprelu", dtype=torch.float32), tmp_path)
    rewrite(tmp_path, tensors=lambda t: t.update(W_dec=t["W_dec"].half(), b_dec=t["b_dec"].half()))
    rewrite(tmp_path, tensors=lambda t: t.update(b_enc=t["b_enc"].half()))
    with pytest.raises(ValueError, match="float16"):
        load(tmp_path)


def test_a_truncated_weight_file_is_a_format_error(tmp_path):
    save(make(dtype=torch.float32), tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(FormatError, match=WEIGHTS):
        load(tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save(make(metadata={"mean": torch.zeros(2)}), tmp_path / "new")
    assert not (tmp_path / "new").exists()
