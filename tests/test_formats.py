"""Checkpoints: written and read back bit for bit, read as their makers meant, or refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from sae_cases import ACTIVATIONS, D_IN, KINDS, LATENTS, TRANSFORMS, inputs, make
from safetensors.torch import load_file, save_file

from saert.activations import BatchTopK, JumpReLU
from saert.hub.format import FormatError, save
from saert.hub.formats.saelens import CONFIG, WEIGHTS
from saert.hub.load import load, load_all
from saert.sae import SAE

# -- round trip ----------------------------------------------------------------------------------


def same_numbers(a: SAE, b: SAE) -> None:
    assert a.subtract_b_dec == b.subtract_b_dec
    assert a.input_transform == b.input_transform
    assert a.select_by_decoder_norm == b.select_by_decoder_norm
    assert (a.hookpoint, a.target_hookpoint) == (b.hookpoint, b.target_hookpoint)
    assert a.is_transcoder == b.is_transcoder
    assert type(a.activation) is type(b.activation)
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
    [("topk", "none", "transcoder"), ("relu", "mean_centre", "sae"), ("relu", "none", "sae_skip")],
)
def test_what_saelens_cannot_express_is_written_so_that_it_refuses(tmp_path, act, transform, kind):
    save(make(act, transform, kind, dtype=torch.float32), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["architecture"] == "saert"


def test_an_unknown_format_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'gguf', expected 'saelens'"):
        save(make(), tmp_path / "new", format="gguf")
    assert not (tmp_path / "new").exists()


# -- other people's files ------------------------------------------------------------------------

CASES = [
    "saelens_gated",
    "saelens_jumprelu",
    "saelens_standard",
    "saelens_standard_layer_norm",
    "saelens_topk",
    "saelens_transcoder",
]


@pytest.mark.parametrize("name", CASES)
def test_saelens_checkpoints_give_what_saelens_gives(shared, name):
    folder = shared / "cases" / name
    case = json.loads((folder / "case.json").read_text())
    sae = load(folder / "repo", case["path"], dtype=torch.float32)
    expected = load_file(folder / "expected.safetensors")
    found = {"latents": sae.encode(expected["x"]).to_dense(), "recon": sae(expected["x"])}
    assert (found["latents"] != 0).equal(expected["latents"] != 0)
    for key, value in found.items():
        within = 1e-4 * expected[key].abs().max().item()
        torch.testing.assert_close(value, expected[key], rtol=0, atol=within)
    assert sae.is_transcoder == (case.get("kind") == "transcoder")
    assert sae.metadata["base_model"] == "gpt2-small"


def test_every_saelens_case_is_tested(shared):
    assert sorted(path.name for path in (shared / "cases").glob("saelens_*")) == CASES


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


@pytest.mark.parametrize("act", ["topk", "jumprelu"])
def test_batchtopk_is_known_from_how_it_was_trained(tmp_path, act):
    save(make("batchtopk", dtype=torch.float32), tmp_path)
    assert isinstance(load(tmp_path).activation, BatchTopK)
    rewrite(tmp_path, config=lambda c: c["metadata"].pop("training_architecture"))
    assert type(load(tmp_path).activation) is JumpReLU


def test_rescaling_by_decoder_norm_is_folded_into_the_weights(tmp_path):
    # FORMATS section 2: top-k on pre·‖W_dec‖, latents keep the factor, decode divides it out
    sae, x = make("topk", kind="sae_plain"), inputs(6)
    save(sae, tmp_path)
    rewrite(tmp_path, config=lambda c: c.update(rescale_acts_by_decoder_norm=True))
    norm = sae.W_dec.norm(dim=-1)
    score = (x @ sae.W_enc.T + sae.b_enc) * norm
    kept = torch.zeros_like(score).scatter(-1, (top := score.topk(5)).indices, top.values.relu())
    loaded = load(tmp_path)
    torch.testing.assert_close(loaded.encode(x).to_dense(), kept)
    torch.testing.assert_close(loaded(x), (kept / norm) @ sae.W_dec + sae.b_dec)


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
        (dict(sparsity_coefficient=3), r"unknown keys \['sparsity_coefficient'\].*'jumprelu'"),
        (dict(k=5), r"unknown keys \['k'\]"),
        (dict(architecture="matching_pursuit"), "'matching_pursuit', expected one of gated, jump"),
        (dict(architecture=None), "architecture None, expected one of"),
        (
            dict(d_sae=LATENTS + 1),
            rf"declares d_sae, d_in = \[25, 10\].*W_enc holds \[{LATENTS}, 10",
        ),
        (dict(d_in=D_IN - 1), r"declares d_sae, d_in = \[24, 9\]"),
        (dict(metadata={"sae_lens_version": "5.10.2"}), "SAELens 5.10.2.*SAELens 6"),
        (dict(metadata={}), "before 6"),
        (dict(metadata=None), "before 6"),
        (
            dict(normalize_activations="batch"),
            "normalize_activations 'batch', expected one of none",
        ),
        (dict(normalize_activations="mean_centre"), "normalize_activations 'mean_centre'"),
        (dict(reshape_activations="flat"), "reshape_activations 'flat'"),
        (dict(architecture="topk"), "found tensors.*threshold"),
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


def test_legacy_configs_are_refused_by_their_age(tmp_path):
    save(make(dtype=torch.float32), tmp_path)
    legacy = {"d_in": D_IN, "d_sae": LATENTS, "hook_point": "blocks.0.hook_resid_post"}
    (tmp_path / CONFIG).write_text(json.dumps(legacy))
    with pytest.raises(FormatError, match="SAELens before 6"):
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
        (lambda t: t.pop("b_enc"), r"found tensors .*expected .*b_enc"),
        (lambda t: t.pop("threshold"), r"expected .*threshold"),
        (lambda t: t.pop("W_enc"), r"expected .*W_enc"),
        (lambda t: t.update(log_threshold=torch.zeros(3)), "log_threshold"),
        (lambda t: t.update(W_skip=torch.zeros(D_IN, D_IN)), "W_skip"),
        (lambda t: t.update(W_enc=torch.zeros(5)), r"W_enc is \[5\], expected \[d_in, num"),
        (lambda t: t.update(W_enc=t["W_enc"].T.contiguous()), r"W_enc holds \[10, 24\]"),
        (lambda t: t.update(W_dec=torch.zeros(LATENTS, 3)), r"output width of 10.*\[24, 3\]"),
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


# -- folders -------------------------------------------------------------------------------------


@pytest.fixture
def saes(tmp_path) -> Path:
    """A folder laid out as a repository with three SAEs."""
    for path, at in [("a/resid_post.0", 0), ("a/resid_post.1", 1), ("b", 2)]:
        sae = make("topk", hookpoint=f"resid_post.{at}", dtype=torch.float32)
        sae.b_enc.data += at
        save(sae, tmp_path / path)
    (tmp_path / "README.md").write_text("three")
    return tmp_path


@pytest.mark.parametrize("as_text", [False, True])
def test_a_folder_inside_a_source_is_loaded(saes, as_text):
    source = str(saes) if as_text else saes
    assert str(load(source, "a/resid_post.1").hookpoint) == "resid_post.1"
    assert str(load(source, "./b/").hookpoint) == "resid_post.2"
    assert str(load(saes / "a", "resid_post.0").hookpoint) == "resid_post.0"


def test_the_path_may_be_left_out_where_there_is_only_one(saes):
    assert str(load(saes / "b").hookpoint) == "resid_post.2"
    for at in ("a/resid_post.0", "a/resid_post.1"):
        for file in (saes / at).iterdir():
            file.unlink()
    assert str(load(saes).hookpoint) == "resid_post.2"


def test_several_saes_and_no_path_lists_them(saes):
    with pytest.raises(FileNotFoundError, match="which SAE.*a/resid_post.0, a/resid_post.1, b"):
        load(saes)


def test_a_wrong_path_lists_what_there_is(saes):
    with pytest.raises(
        FileNotFoundError, match="'a/resid_post.9'.*a/resid_post.0, a/resid_post.1, b"
    ):
        load(saes, "a/resid_post.9")


def test_a_folder_without_an_sae_names_what_it_holds(saes):
    with pytest.raises(
        FormatError, match=rf"a: no SAE found; expected {CONFIG} and {WEIGHTS}.*resid"
    ):
        load(saes, "a")
    (saes / "b" / WEIGHTS).unlink()
    with pytest.raises(FormatError, match=rf"{WEIGHTS}, found \['{CONFIG}'\]"):
        load(saes, "b")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc", "a/..", "", " "])
def test_paths_that_leave_the_source_are_refused(saes, path):
    with pytest.raises(FormatError, match="expected a folder inside the source"):
        load(saes / "a", path)


@pytest.mark.parametrize("source", ["/no/such", "./no", "a/b/c", Path("no")], ids=str)
def test_a_missing_folder_is_no_repo(source):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(source)


def test_a_revision_of_a_folder_is_refused(saes):
    with pytest.raises(ValueError, match="revision='main' is for Hub repos"):
        load(saes, "b", revision="main")


@pytest.mark.parametrize(
    ("pattern", "layers"), [("*", [0, 1, 2]), ("a/*", [0, 1]), ("*.1", [1]), ("b", [2])]
)
def test_load_all_is_keyed_by_hookpoint(saes, pattern, layers):
    found = load_all(saes, pattern, dtype=torch.float64)
    assert sorted(found) == [f"resid_post.{layer}" for layer in layers]
    for key, sae in found.items():
        assert str(sae.hookpoint) == key
        assert sae.dtype == torch.float64


def test_load_all_of_nothing_lists_what_there_is(saes):
    with pytest.raises(FileNotFoundError, match=r"no SAE matches 'c\*'.*a/resid_post.0"):
        load_all(saes, "c*")


def test_load_all_refuses_two_saes_at_one_hookpoint(saes):
    save(make("topk", hookpoint="resid_post.1", dtype=torch.float32), saes / "c")
    with pytest.raises(ValueError, match="two SAEs read resid_post.1"):
        load_all(saes)


# -- the Hub -------------------------------------------------------------------------------------

# Runs in a process of its own, because huggingface_hub reads its environment at import. Each step
# reports what it got, and marks its place in the server's log.
CLIENT = """
import json, sys, urllib.request
import huggingface_hub, torch
from saert.hub.load import load, load_all

steps = {
    "load": lambda: load("someone/saes", "resid_post.0"),
    "again": lambda: load("someone/saes", "resid_post.0"),
    "tag": lambda: load("someone/saes", "resid_post.0", revision="v1"),
    "sha": lambda: load("someone/saes", "resid_post.0", revision=sys.argv[2]),
    "wrong path": lambda: load("someone/saes", "resid_post.7"),
    "traversal": lambda: load("someone/saes", "../x"),
    "wrong revision": lambda: load("someone/saes", "resid_post.0", revision="v9"),
    "no repo": lambda: load("someone/nothing", "resid_post.0"),
    "no path": lambda: load("someone/saes"),
    "only one": lambda: load("someone/one"),
    "all": lambda: load_all("someone/saes", "*.1")["resid_post.1"],
    "offline": lambda: load("someone/saes", "resid_post.0"),
}
report = {}
for name, step in steps.items():
    try:
        urllib.request.urlopen(sys.argv[1] + "/mark/" + urllib.parse.quote(name))
    except urllib.error.HTTPError:
        pass
    huggingface_hub.constants.HF_HUB_OFFLINE = name == "offline"
    try:
        sae = step()
        report[name] = dict(
            metadata={k: v for k, v in sae.metadata.items() if k in ("source", "revision")},
            hookpoint=str(sae.hookpoint), mark=sae.b_dec[0].item(),
        )
    except Exception as error:
        kinds = [k.__name__ for k in type(error).__mro__]
        report[name] = dict(error=kinds, module=type(error).__module__, text=str(error))
print(json.dumps(report))
"""


def repository(folder: Path, mark: float, layers: list[int]) -> dict[str, bytes]:
    for layer in layers:
        sae = make("topk", hookpoint=f"resid_post.{layer}", dtype=torch.float32)
        sae.b_dec.data[0] = mark
        save(sae, folder / f"resid_post.{layer}")
    (folder / "README.md").write_text("someone's SAEs")
    (folder / "resid_post.0" / "examples.safetensors").write_bytes(b"large")
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[HubServer, dict[str, Any], dict[str, list[tuple[str, str]]]]:
    """A Hub, what a client got from it, and what it asked for, step by step."""
    tmp = tmp_path_factory.mktemp("hub")
    versions = {
        "main": repository(tmp / "main", 2.0, [0, 1]),
        "v1": repository(tmp / "v1", 1.0, [0, 1]),
    }
    repos = {"someone/saes": versions, "someone/one": {"main": repository(tmp / "one", 3.0, [0])}}
    with HubServer(repos) as server:
        run = subprocess.run(
            [sys.executable, "-c", CLIENT, server.url, server.commit("someone/saes", "v1")],
            env=server.environment(tmp / "home"),
            cwd=tmp,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
    requests: dict[str, list[tuple[str, str]]] = {}
    for method, path in server.log:
        if path.startswith("/mark/"):
            requests[path.removeprefix("/mark/")] = []
        else:
            requests[list(requests)[-1]].append((method, path))
    return server, json.loads(run.stdout.splitlines()[-1]), requests


@pytest.mark.parametrize(
    ("step", "revision", "mark"),
    [("load", "main", 2.0), ("again", "main", 2.0), ("tag", "v1", 1.0), ("sha", "v1", 1.0)],
)
def test_a_hub_sae_remembers_the_commit_it_came_from(hub, step, revision, mark):
    server, report, _ = hub
    commit = server.commit("someone/saes", revision)
    assert report[step].get("mark") == mark, report[step]
    assert report[step]["metadata"] == {"source": "someone/saes", "revision": commit}
    assert report[step]["hookpoint"] == "resid_post.0"


def test_only_the_files_of_one_sae_are_fetched_and_only_once(hub):
    _, _, requests = hub

    def fetched(step: str) -> list[str]:
        resolve = re.compile("/someone/saes/resolve/[^/]+/(.*)")
        found = [resolve.fullmatch(path) for method, path in requests[step] if method == "GET"]
        return sorted(m[1] for m in found if m is not None)

    assert fetched("load") == [f"resid_post.0/{CONFIG}", f"resid_post.0/{WEIGHTS}"]
    assert requests["again"]  # the branch may have moved
    assert fetched("again") == []


def test_a_path_that_a_repo_does_not_hold_lists_those_it_does(hub):
    _, report, _ = hub
    assert report["wrong path"]["error"][0] == "FileNotFoundError"
    text = report["wrong path"]["text"]
    assert "someone/saes: no SAE at resid_post.7; it holds resid_post.0, resid_post.1" in text
    assert report["no path"]["error"][0] == "FileNotFoundError"
    assert "it holds resid_post.0, resid_post.1" in report["no path"]["text"]


def test_a_path_out_of_a_repo_asks_the_hub_nothing(hub):
    _, report, requests = hub
    assert report["traversal"]["error"][0] == "FormatError"
    assert requests["traversal"] == []


@pytest.mark.parametrize(
    ("step", "error"),
    [("no repo", "RepositoryNotFoundError"), ("wrong revision", "RevisionNotFoundError")],
)
def test_the_hub_s_own_errors_come_through(hub, step, error):
    _, report, _ = hub
    assert report[step]["error"][0] == error
    assert report[step]["module"] == "huggingface_hub.errors"


def test_load_all_reads_what_matches_from_a_repo(hub):
    _, report, requests = hub
    assert report["all"].get("hookpoint") == "resid_post.1", report["all"]
    files = [path for _, path in requests["all"] if "/resolve/" in path]
    assert files
    assert all("/resid_post.1/" in path for path in files)


def test_the_path_may_be_left_out_where_a_repo_holds_only_one(hub):
    _, report, _ = hub
    assert report["only one"].get("mark") == 3.0, report["only one"]


def test_what_is_cached_loads_offline(hub):
    server, report, _ = hub
    assert report["offline"].get("mark") == 2.0, report["offline"]
    assert report["offline"]["metadata"]["revision"] == server.commit("someone/saes")
