"""EleutherAI sparsify's checkpoints, old and new: read as it computes them, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_cases import inputs, make
from safetensors.torch import load_file, save_file

from saert.activations import AbsTopK, GroupMax, TopK
from saert.hookpoint import Hookpoint
from saert.hub.format import FormatError, save
from saert.hub.load import load, load_all
from saert.sae import SAE

D, N, K = 8, 24, 4
NEW = dict(
    activation="topk", expansion_factor=3, normalize_decoder=True, num_latents=0, k=K,
    multi_topk=False, skip_connection=False, transcode=False, d_in=D,
)  # fmt: skip
OLD = dict(expansion_factor=3, normalize_decoder=True, k=K, signed=False, d_in=D)


def draw(n: int = N, d: int = D, *, skip: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "encoder.weight": normal(n, d), "encoder.bias": normal(n) / 3,
        "W_dec": normal(n, d), "b_dec": normal(d),
    }  # fmt: skip
    return tensors | ({"W_skip": normal(d, d)} if skip else {})


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    skip = config.get("skip_connection") is True
    save_file(draw(skip=skip) if tensors is None else tensors, folder / "sae.safetensors")
    return folder


def sparsify(config: dict[str, Any], tensors: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
    """Latents and output of FORMATS section 1, token by token, in float64."""
    t = {name: value.double() for name, value in tensors.items()}
    latents = torch.zeros(len(x), len(t["W_dec"]), dtype=torch.float64)
    k, signed = config["k"], config.get("signed", False)
    for row, token in zip(latents, x.double(), strict=True):
        read = token if config.get("transcode") else token - t["b_dec"]
        pre = torch.mv(t["encoder.weight"], read) + t["encoder.bias"]
        if config.get("activation") == "groupmax":
            size = len(pre) // k
            kept = [g * size + int(pre[g * size : (g + 1) * size].argmax()) for g in range(k)]
        else:
            kept = sorted(range(len(pre)), key=lambda i: abs(pre[i]) if signed else pre[i])[-k:]
        for i in kept:
            row[i] = pre[i] if signed else max(pre[i].item(), 0.0)
    output = latents @ t["W_dec"] + t["b_dec"]
    return latents, output + x.double() @ t["W_skip"].T if "W_skip" in t else output


def agrees(sae: SAE, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    x = inputs(40, d_in=sae.d_in, dtype=torch.float32)
    latents, output = sparsify(config, tensors, x)
    found = sae.encode(x).to_dense()
    assert (found != 0).equal(latents != 0)
    torch.testing.assert_close(found.double(), latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(sae(x).double(), output, rtol=0, atol=1e-4)


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparsify_topk", "sparsify_skip_transcoder"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_checkpoints_give_what_sparsify_gives(shared, name, dtype):
    folder = shared / "cases" / name
    case = json.loads((folder / "case.json").read_text())
    sae = load(folder / "repo", case["path"], dtype=dtype)
    expected = load_file(folder / "expected.safetensors")
    found = {"latents": sae.encode(expected["x"]).to_dense(), "recon": sae(expected["x"])}
    assert (found["latents"] != 0).equal(expected["latents"] != 0)
    for key, value in found.items():
        within = 1e-4 * expected[key].abs().max().item()
        torch.testing.assert_close(value, expected[key], rtol=0, atol=within)
    transcoder = case.get("kind") == "transcoder"
    assert sae.is_transcoder == transcoder
    at = case["path"]
    assert (str(sae.hookpoint), sae.target_hookpoint and str(sae.target_hookpoint)) == (
        (f"{at}:in", at) if transcoder else (at, None)
    )


@pytest.mark.parametrize("size", ["wide", "square"])
@pytest.mark.parametrize(
    "config",
    [
        NEW,
        OLD,
        NEW | dict(activation="groupmax"),
        OLD | dict(signed=True),
        NEW | dict(transcode=True),
        NEW | dict(transcode=True, skip_connection=True),
        NEW | dict(skip_connection=True),
        OLD | dict(skip_connection=True),
        NEW | dict(multi_topk=True, normalize_decoder=False),
        NEW | dict(embed_skip=False, gram_lookup=False, lookup_max_order=4, gram_table_hash=None),
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items() if NEW.get(k, False) != v) or "plain",
)
def test_the_equations_hold(tmp_path, config, size):
    n = N if size == "wide" else D
    config = config | {"expansion_factor": n // D}
    tensors = draw(n, skip=config.get("skip_connection", False))
    sae = load(write(tmp_path / "layers.3", config, tensors))
    kinds = {"groupmax": GroupMax, "topk": AbsTopK if config.get("signed") else TopK}
    assert type(sae.activation) is kinds[config.get("activation", "topk")]
    agrees(sae, config, tensors)


def test_bfloat16_is_kept_or_widened(tmp_path):
    tensors = {name: value.bfloat16() for name, value in draw().items()}
    write(tmp_path / "layers.0", NEW, tensors)
    assert load(tmp_path).dtype == torch.bfloat16
    agrees(load(tmp_path, dtype=torch.float32), NEW, tensors)
    agrees(load(tmp_path), NEW, tensors)


def test_num_latents_wins_over_the_expansion_factor(tmp_path):
    tensors = draw(20)
    agrees(load(write(tmp_path / "layers.0", NEW | dict(num_latents=20), tensors)), NEW, tensors)


@pytest.mark.parametrize(
    ("folder", "hookpoint"),
    [
        ("layers.10", "layers.10"),
        ("h.0.attn", "h.0.attn"),
        ("embed_tokens", "embed_tokens"),
        ("decoder.layers.2.fc2", "decoder.layers.2.fc2"),
        ("layers.4/seed1", "layers.4"),
        ("run/best/layers.4", "layers.4"),
        ("norm", "norm"),  # config.json lists it
        ("resid_post.2", "resid_post.2"),
        ("my-sae.3", None),
        ("checkpoint", None),
    ],
)
def test_the_folder_says_where_an_sae_reads(tmp_path, folder, hookpoint):
    write(tmp_path / folder, NEW)
    training = dict(sae={}, model="EleutherAI/pythia-70m", dataset="pile", ctx_len=2048)
    training |= dict(hookpoints=["norm"], revision=None, batch_size=32, transcode=False)
    (tmp_path / "config.json").write_text(json.dumps(training))
    sae = load(tmp_path, folder)
    assert sae.hookpoint == (None if hookpoint is None else Hookpoint.parse(hookpoint))
    assert sae.target_hookpoint is None
    assert sae.metadata == {
        "format": "sparsify", "hook_name": folder.removesuffix("/seed1").rpartition("/")[2],
        "base_model": "EleutherAI/pythia-70m", "dataset": "pile", "context_size": 2048,
    }  # fmt: skip


def test_a_config_that_is_no_training_config_says_nothing(tmp_path):
    write(tmp_path / "layers.1", NEW)
    (tmp_path / "config.json").write_text(json.dumps(dict(model="wrong", transcode=True)))
    sae = load(tmp_path)
    assert not sae.is_transcoder
    assert "base_model" not in sae.metadata


@pytest.mark.parametrize(
    ("repo", "config", "training", "transcoder"),
    [
        ("saes", OLD, None, False),
        ("saes", OLD | dict(skip_connection=True), None, True),
        ("saes", OLD, dict(sae={}, transcode=True), True),
        ("saes", NEW, dict(sae={}, transcode=True), True),  # saved again by a later release
        ("Transcoder-Llama", OLD, None, True),
        ("Transcoder-Llama", NEW, None, False),  # the config says that it is none
        ("saes", NEW | dict(skip_connection=True), None, False),
        ("saes", NEW | dict(transcode=True), None, True),
    ],
)
def test_transcoders_older_than_their_key_are_recognised(
    tmp_path, repo, config, training, transcoder
):
    folder = tmp_path / "transcoders" / repo  # what lies above the repo says nothing
    write(folder / "layers.2.mlp", config)
    if training is not None:
        (folder / "config.json").write_text(json.dumps(training))
    sae = load(folder, "layers.2.mlp")
    assert sae.is_transcoder == transcoder
    # sparsify subtracted b_dec from a transcoder's input until the key came (its PR 49)
    assert sae.subtract_b_dec == (config.get("transcode") is not True)
    if transcoder:
        assert (str(sae.hookpoint), str(sae.target_hookpoint)) == (
            "layers.2.mlp:in",
            "layers.2.mlp",
        )
    agrees(sae, config, draw(skip=config.get("skip_connection", False)))


def test_an_option_says_what_neither_config_nor_names_do(tmp_path):
    write(tmp_path / "layers.2.mlp", OLD)
    assert not load(tmp_path).is_transcoder
    asked = load(tmp_path, transcode=True)
    assert asked.is_transcoder
    assert asked.subtract_b_dec
    with pytest.raises(ValueError, match="transcode='yes', expected one of"):
        load(tmp_path, transcode="yes")
    with pytest.raises(TypeError, match=r"unknown options \['signed'\]"):
        load(tmp_path, signed=True)


@pytest.mark.parametrize("folder", ["checkpoint", "resid_post.2"])
def test_a_transcoder_of_no_module_is_refused(tmp_path, folder):
    write(tmp_path / folder, NEW | dict(transcode=True))
    with pytest.raises(FormatError, match=f"transcoder in a folder called '{folder}'.*layers.7"):
        load(tmp_path)


def test_several_saes_among_other_files(tmp_path):
    for layer in (0, 1):
        write(tmp_path / f"layers.{layer}", NEW)
    (tmp_path / "README.md").write_text("two")
    (tmp_path / "layers.0" / "optimizer.pt").write_bytes(b"none of ours")
    save(make("topk", dtype=torch.float32, hookpoint="resid_post.5"), tmp_path / "ours")
    assert sorted(load_all(tmp_path)) == ["layers.0", "layers.1", "resid_post.5"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(batch_topk=False), r"unknown keys \['batch_topk'\]"),
        (dict(sample_topk=True, input_unit_norm=True), r"\['input_unit_norm', 'sample_topk'\]"),
        (dict(embed_skip=True), "embed_skip is True"),
        (dict(gram_lookup=True), "gram_lookup is True"),
        (dict(activation="jumprelu"), r"activation is 'jumprelu', expected one of \['topk'"),
        (dict(activation="groupmax", signed=True), "signed and groupmax"),
        (dict(activation="groupmax", k=5), "24 latents do not divide into k = 5"),
        (dict(k=0), "k is 0, expected an integer of at least 1"),
        (dict(k="4"), "k is '4'"),
        (dict(k=N + 1), f"k is {N + 1}, but there are only {N} latents"),
        (dict(d_in=D + 1), f"declares d_in = {D + 1}, but the tensors hold {D}"),
        (dict(expansion_factor=4), f"declares 32 latents, but the tensors hold {N}"),
        (dict(expansion_factor="3"), "expansion_factor is '3'"),
        (dict(num_latents=[24]), r"num_latents is \[24\]"),
        (dict(num_latents=25), "declares 25 latents"),
        (dict(signed=1), "signed is 1, expected one of"),
        (dict(transcode="false"), "transcode is 'false'"),
        (dict(skip_connection=True), r"missing \['W_skip'\]"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_meant_are_named(tmp_path, change, match):
    write(tmp_path / "layers.0", NEW | change, draw())
    with pytest.raises(FormatError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("key", ["k", "d_in"])
def test_missing_keys_are_named(tmp_path, key):
    write(tmp_path / "layers.0", {name: value for name, value in NEW.items() if name != key})
    with pytest.raises(FormatError, match=rf"missing keys \['{key}'\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (draw(skip=True), r"unknown \['W_skip'\]"),
        ({k: v for k, v in draw().items() if k != "W_dec"}, r"missing \['W_dec'\]"),
        (draw() | {"W_dec": draw()["W_dec"].T.contiguous()}, r"W_dec is \[8, 24\], expected \[24"),
        (draw() | {"b_dec": torch.zeros(D + 1)}, r"b_dec is \[9\], expected \[8\]"),
        (draw() | {"encoder.bias": torch.zeros(D)}, r"encoder.bias is \[8\], expected \[24\]"),
        (draw() | {"encoder.weight": torch.zeros(N)}, "expected a matrix"),
        (draw() | {"W_dec": torch.full((N, D), torch.nan)}, "W_dec contains NaN"),
        (draw() | {"b_dec": torch.zeros(D).bfloat16()}, "b_dec is torch.bfloat16, but W_enc"),
    ],
    ids=["skip", "no W_dec", "transposed", "b_dec", "bias", "vector", "nan", "mixed"],
)
def test_tensors_that_contradict_the_config_are_named(tmp_path, tensors, match):
    write(tmp_path / "layers.0", NEW, tensors)
    with pytest.raises(FormatError, match=match):
        load(tmp_path)
