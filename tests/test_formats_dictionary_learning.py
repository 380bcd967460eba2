"""dictionary_learning: every class of it, from `ae.pt` and config.json or from `ae.pt` alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pt_cases import Drawn, above, agrees, agrees_with_case, compute, draw, relu, topk
from sae_cases import inputs
from torch import Tensor

from saert.hub.detect import find_saes
from saert.hub.format import FormatError
from saert.hub.load import load

K, THETA = 4, 0.9
FOLDER = "resid_post_layer_12/trainer_0"


def layers(w: Drawn, **more: Tensor) -> dict[str, Tensor]:
    return {"encoder.weight": w.W_enc, "decoder.weight": w.W_dec.T.contiguous()} | more


def biased(w: Drawn, **more: Tensor) -> dict[str, Tensor]:
    return layers(w) | {"encoder.bias": w.b_enc} | more


def parameters(w: Drawn, **more: Tensor) -> dict[str, Tensor]:
    return dict(W_enc=w.W_enc.T.contiguous(), W_dec=w.W_dec, b_enc=w.b_enc, b_dec=w.b_dec, **more)


def counts(theta: float = THETA) -> dict[str, Tensor]:
    return dict(k=torch.tensor(K, dtype=torch.int32), threshold=torch.tensor(theta))


def stored(w: Drawn, kind: str) -> dict[str, Tensor]:
    """The state dict of one class."""
    n = len(w.W_enc)
    return {
        "AutoEncoder": lambda: biased(w, bias=w.b_dec),
        "AutoEncoderNew": lambda: biased(w) | {"decoder.bias": w.b_dec},
        "GatedAutoEncoder": lambda: layers(
            w, decoder_bias=w.b_dec, r_mag=w.r_mag, gate_bias=w.b_gate, mag_bias=w.b_enc
        ),
        "AutoEncoderTopK": lambda: biased(w, b_dec=w.b_dec, **counts()),
        "BatchTopKSAE": lambda: biased(w, b_dec=w.b_dec, **counts()),
        "MatryoshkaBatchTopKSAE": lambda: parameters(
            w, group_sizes=torch.tensor([2, n - 2]), **counts()
        ),
        "MatroyshkaBatchTopKSAE": lambda: stored(w, "MatryoshkaBatchTopKSAE"),
        "JumpReluAutoEncoder": lambda: parameters(w, threshold=w.theta),
    }[kind]()


KINDS = [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE", "JumpReluAutoEncoder",
]  # fmt: skip


def config(kind: str, n: int = 24, d: int = 8, **trainer: Any) -> dict[str, Any]:
    return {
        "trainer": dict(
            trainer_class="X", dict_class=kind, lr=5e-5, steps=244140, seed=0, activation_dim=d,
            dict_size=n, device="cuda:0", layer=12, lm_name="google/gemma-2-2b", wandb_name=kind,
            submodule_name="resid_post_layer_12",
        ) | ({"k": K} if "TopK" in kind else {}) | trainer,
        "buffer": dict(
            d_submodule=d, io="out", n_ctxs=244, ctx_len=1024, refresh_batch_size=24,
            out_batch_size=2048, device="cuda:0",
        ),
    }  # fmt: skip


def write(root: Path, tensors: Any, config: Any = None, folder: str = FOLDER) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    torch.save(tensors, root / folder / "ae.pt")
    if config is not None:
        (root / folder / "config.json").write_text(json.dumps(config))
    return root


def expected(w: Drawn, kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """FORMATS section 6, latents as stored."""
    if kind == "GatedAutoEncoder":
        W_enc, W_dec, b_dec = w.W_enc.double(), w.W_dec.double(), w.b_dec.double()
        pi = (x.double() - b_dec) @ W_enc.T
        gate = pi + w.b_gate.double() > 0
        latents = gate * (pi * w.r_mag.double().exp() + w.b_enc.double()).clamp(min=0)
        return latents, latents @ W_dec + b_dec
    activate = {
        "AutoEncoderTopK": topk(K),
        "BatchTopKSAE": above(THETA),
        "MatryoshkaBatchTopKSAE": above(THETA),
        "MatroyshkaBatchTopKSAE": above(THETA),
        "JumpReluAutoEncoder": above(w.theta.double()),
    }.get(kind, relu)
    subtract = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    return compute(w, x, activate, subtract=subtract)


@pytest.mark.parametrize("n", [24, 8], ids=["n>d", "square"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_computes_its_equations(tmp_path, kind, n):
    w, x = draw(n), inputs(40, d_in=8, dtype=torch.float32)
    write(tmp_path, stored(w, kind), config(kind, n))
    options = {"normalize_decoder": False} if kind == "AutoEncoder" else {}
    sae = load(tmp_path, FOLDER, **options)
    agrees(sae, x, expected(w, kind, x))
    assert sae.metadata["format"] == "dictionary_learning"
    assert sae.metadata.get("declared") == ({"l0": 4.0} if "TopK" in kind else None)


@pytest.mark.parametrize("asked", [None, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_are_used_as_stored(tmp_path, kind, asked):
    w, x = draw(dtype=torch.bfloat16), inputs(40, d_in=8, dtype=torch.float32)
    tensors = stored(w, kind)
    write(tmp_path, tensors, config(kind))
    sae = load(tmp_path, dtype=asked, normalize_decoder=False)
    assert sae.dtype == (asked or torch.bfloat16)
    agrees(sae, x, expected(w, kind, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autoencoder_s_latents_carry_the_decoder_norm(tmp_path, dtype):
    w, x = draw(dtype=dtype), inputs(40, d_in=8, dtype=torch.float32)
    write(tmp_path, stored(w, "AutoEncoder"), config("AutoEncoder"))
    latents, output = expected(w, "AutoEncoder", x)
    sae = load(tmp_path)
    agrees(sae, x, (latents * w.W_dec.double().norm(dim=1), output))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_decoder_row_of_zeros_stays_zero(tmp_path):
    w = draw()
    w.W_dec[3] = 0
    sae = load(write(tmp_path, stored(w, "AutoEncoder"), config("AutoEncoder")))
    assert not sae.W_dec[3].any()
    assert not sae.encode(inputs(40, d_in=8, dtype=torch.float32)).to_dense()[:, 3].any()


def test_unit_norm_decoders_are_left_as_they_are(tmp_path):
    w = draw()
    w.W_dec.div_(w.W_dec.norm(dim=1, keepdim=True))
    sae = load(write(tmp_path, stored(w, "AutoEncoder"), config("AutoEncoder")))
    assert sae.W_enc.equal(w.W_enc)
    assert sae.W_dec.equal(w.W_dec)


def test_a_threshold_that_was_never_estimated_lets_every_positive_pass(tmp_path):
    w, x = draw(), inputs(40, d_in=8, dtype=torch.float32)
    tensors = stored(w, "BatchTopKSAE") | counts(-1.0)
    sae = load(write(tmp_path, tensors, config("BatchTopKSAE")))
    agrees(sae, x, compute(w, x, relu, subtract=True))


def test_a_large_k_survives_a_coarse_dtype(tmp_path):
    tensors = stored(draw(400), "AutoEncoderTopK") | {"k": torch.tensor(321)}
    write(tmp_path, tensors, config("AutoEncoderTopK", n=400, k=321))
    assert load(tmp_path, dtype=torch.bfloat16).activation.k == 321


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("case", "hookpoint", "model"),
    [
        ("dl_topk", "resid_post.12", "google/gemma-2-2b"),
        ("dl_batchtopk", "resid_post.3", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_their_library_gives_the_same(shared, case, hookpoint, model, dtype):
    sae = agrees_with_case(shared / "cases" / case, dtype)
    assert str(sae.hookpoint) == hookpoint
    assert sae.metadata["base_model"] == model


# -- where it reads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "io", "hookpoint"),
    [
        ("resid_post_layer_3", 3, "out", "resid_post.3"),
        ("resid_post_layer_3", 3, "in", "resid_pre.3"),
        ("resid_out_layer3", 3, "out", "resid_post.3"),
        ("mlp_out_layer_3", 3, "out", "mlp_out.3"),
        ("mlp_out_layer_3", 3, "in", "mlp_in.3"),
        ("attn_out_layer_3", None, "out", "attn_out.3"),
        ("attn_out_layer_3", 3, "in", "None"),
        ("gpt_neox.layers.3.mlp", 3, "out", "gpt_neox.layers.3.mlp"),
        ("gpt_neox.layers.3.mlp", 3, "in", "gpt_neox.layers.3.mlp:in"),
        ("something", 3, "out", "None"),
        (None, 12, "out", "resid_post.12"),  # of the folder
    ],
)
def test_the_submodule_is_a_hookpoint(tmp_path, name, layer, io, hookpoint):
    given = config("AutoEncoder", submodule_name=name, layer=layer)
    given["buffer"]["io"] = io
    sae = load(write(tmp_path, stored(draw(), "AutoEncoder"), given))
    assert str(sae.hookpoint) == hookpoint
    assert sae.metadata["hook_name"] == (name or "resid_post_layer_12")


def test_a_layer_alone_is_the_residual_stream(tmp_path):
    given = config("AutoEncoder", submodule_name=None, layer=5)
    root = write(tmp_path / "a", stored(draw(), "AutoEncoder"), given, folder="trainer_1")
    assert str(load(root).hookpoint) == "resid_post.5"


def test_a_layer_may_be_text(tmp_path):
    write(tmp_path, AE, config("AutoEncoder", layer="12"))
    assert str(load(tmp_path).hookpoint) == "resid_post.12"
    write(tmp_path, AE, config("AutoEncoder", layer="7", submodule_name=None), folder="x")
    assert str(load(tmp_path, "x").hookpoint) == "resid_post.7"


@pytest.mark.parametrize(
    "keys", ["lambda_warm_steps", "activation_queue_length", "l0_penalty", "gp_reg_coeff"]
)
def test_what_earlier_trainers_wrote_changes_nothing(tmp_path, keys):
    write(tmp_path, AE, config("AutoEncoder", **{keys: 10}))
    assert load(tmp_path).num_latents == 24


def test_single_heads_have_no_hookpoint(tmp_path):
    given = config("AutoEncoder") | {"buffer": {"layer": 12, "n_ctxs": 9, "ctx_len": 128}}
    sae = load(write(tmp_path, stored(draw(), "AutoEncoder"), given))
    assert sae.hookpoint is None
    assert sae.metadata["context_size"] == 128


# -- without a config ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE",
     "JumpReluAutoEncoder"],
)  # fmt: skip
def test_tensors_that_leave_one_reading_need_no_config(tmp_path, kind):
    w, x = draw(), inputs(40, d_in=8, dtype=torch.float32)
    sae = load(write(tmp_path, stored(w, kind)), normalize_decoder=False)
    agrees(sae, x, expected(w, kind, x))
    assert str(sae.hookpoint) == "resid_post.12"


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_tensors_that_leave_two_are_refused(tmp_path, kind):
    write(tmp_path, stored(draw(), kind))
    with pytest.raises(FormatError, match=r"fit \['AutoEncoderTopK', 'BatchTopKSAE'\]; put the"):
        load(tmp_path)


def test_the_first_top_k_class_had_its_k_in_the_config(tmp_path):
    w, x = draw(), inputs(40, d_in=8, dtype=torch.float32)
    write(tmp_path, biased(w, b_dec=w.b_dec), config("AutoEncoderTopK"))
    agrees(load(tmp_path), x, expected(w, "AutoEncoderTopK", x))


def test_siblings_are_told_apart(tmp_path):
    for layer in (3, 12):
        given = config("AutoEncoder", layer=layer, submodule_name=f"resid_post_layer_{layer}")
        folder = f"sweep/resid_post_layer_{layer}/trainer_0"
        write(tmp_path, stored(draw(), "AutoEncoder"), given, folder)
        (tmp_path / folder / "eval_results.json").write_text("{}")
    (tmp_path / "README.md").write_text("# SAEs")
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    found = [one.path for one in find_saes(names)]
    assert found == [f"sweep/resid_post_layer_{layer}/trainer_0" for layer in (12, 3)]
    assert [str(load(tmp_path, one).hookpoint) for one in found] == [
        "resid_post.12",
        "resid_post.3",
    ]


# -- refusals ------------------------------------------------------------------------------------

AE = stored(draw(), "AutoEncoder")
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a backup": (
        {"step": 9, "ae": AE, "optimizer": {}, "norm_factor": 3.5}, config("AutoEncoder"),
        r"backup to resume training from, with \['ae', 'norm_factor'.*scale_biases",
    ),
    "another class": (AE, config("CrossCoder"), "dict_class 'CrossCoder', expected one of"),
    "a class of other tensors": (AE, config("AutoEncoderNew"), r"missing \['decoder.bias'\]"),
    "no trainer": (AE, {"model_type": "gemma"}, r"missing keys \['trainer'\]"),
    "a trainer of another type": (AE, {"trainer": 3}, "trainer is 3, expected an object"),
    "an unknown trainer key": (AE, config("AutoEncoder", use_pca_whitening=True), "use_pca"),
    "an unknown buffer key": (
        AE, config("AutoEncoder") | {"buffer": {"rescale": 2}}, r"buffer: unknown keys \['rescale'"
    ),
    "a transcoder's buffer": (
        AE, config("AutoEncoder") | {"buffer": {"io": "in_and_out"}}, "io is 'in_and_out'"
    ),
    "a width": (AE, config("AutoEncoder", d=9), "activation_dim = 9, but the tensors hold 8"),
    "a size": (AE, config("AutoEncoder", n=23), "dict_size = 23, but the tensors hold 24"),
    "a transposed encoder": (
        AE | {"encoder.weight": draw().W_enc.T.contiguous()}, config("AutoEncoder"),
        r"decoder.weight is \[8, 24\], expected \[24, 8\]",
    ),
    "another layer": (AE, config("AutoEncoder", layer=11), "layer is 11, but the submodule is"),
    "a layer in words": (AE, config("AutoEncoder", layer="last"), "layer is 'last', expected a"),
    "another k": (
        stored(draw(), "BatchTopKSAE"), config("BatchTopKSAE", k=5), r"k is \['4', '5'\]"
    ),
    "no k": (biased(draw(), b_dec=draw().b_dec), None, "k is nowhere"),
    "many thresholds": (
        stored(draw(), "BatchTopKSAE") | {"threshold": torch.ones(24)}, config("BatchTopKSAE"),
        r"threshold is \[24\], expected \[\]",
    ),
    "one threshold for all": (
        stored(draw(), "JumpReluAutoEncoder") | {"threshold": torch.ones(())},
        config("JumpReluAutoEncoder"), r"threshold is \[\], expected \[24\]",
    ),
    "groups of another sum": (
        stored(draw(), "MatryoshkaBatchTopKSAE") | {"group_sizes": torch.tensor([2, 3])},
        config("MatryoshkaBatchTopKSAE"), "group_sizes add up to 5, expected 24",
    ),
    "a short gate": (
        stored(draw(), "GatedAutoEncoder") | {"r_mag": torch.ones(3)}, config("GatedAutoEncoder"),
        r"r_mag is \[3\], expected \[24\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_read_without_guessing_is_refused(tmp_path, why):
    tensors, given, message = REFUSED[why]
    write(tmp_path, tensors, given)
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


def test_normalising_is_for_autoencoders(tmp_path):
    write(tmp_path, stored(draw(), "BatchTopKSAE"), config("BatchTopKSAE"))
    with pytest.raises(FormatError, match="option of AutoEncoder, but this is BatchTopKSAE"):
        load(tmp_path, normalize_decoder=True)
    with pytest.raises(ValueError, match="normalize_decoder='no', expected one of"):
        load(tmp_path, normalize_decoder="no")
