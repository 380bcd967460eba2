# ruff: noqa: E501 — names of repositories
"""Short names: what they mean, what they refuse, and that they load with what files do not say."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hub_server import HubServer
from sae_cases import make
from tiny_models import tiny
from typer.testing import CliRunner

from saert import attach
from saert.cli import app
from saert.hub.find import find
from saert.hub.format import save
from saert.hub.registry import TRANSFORMS, lookup, releases
from saert.hub.session import load_sae
from saert.hub.sources.http import HttpError
from saert.transforms import DatasetScale, MeanCentre, NoTransform

NAMES = [
    ("gpt2:openai-32k/resid_post.6", "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_6.pt"),
    ("gpt2:res-jb/11", "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.11.hook_resid_pre"),
    ("gemma-2-2b:gemma-scope-res-16k/12", "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"),
    ("gemma-2-9b-it:gemma-scope-res-131k/20/13", "google/gemma-scope-9b-it-res", "layer_20/width_131k/average_l0_13"),
    ("gemma-2-27b:gemma-scope-res-131k/10", "google/gemma-scope-27b-pt-res", "layer_10/width_131k/average_l0_106"),
    ("gemma-2b:res-jb/12", "jbloom/Gemma-2b-Residual-Stream-SAEs", "gemma_2b_blocks.12.hook_resid_post_16384"),
    ("gemma-2b-it:res-jb/12", "jbloom/Gemma-2b-IT-Residual-Stream-SAEs", "gemma_2b_it_blocks.12.hook_resid_post_16384"),
    ("gemma-3-1b-pt:gemma-scope-2-mlp-16k-big/13", "google/gemma-scope-2-1b-pt", "mlp_out_all/layer_13_width_16k_l0_big"),
    ("llama-3.1-8b:llama-scope/15", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"),
    ("llama-3.1-8b:llama-scope-32x/15", "fnlp/Llama3_1-8B-Base-LXR-32x", "Llama3_1-8B-Base-L15R-32x"),
    ("llama-3.1-8b:llama-scope-transcoder-8x/0", "fnlp/Llama3_1-8B-Base-LXTC-8x", "Llama3_1-8B-Base-L0TC-8x"),
    ("pythia-160m:sparsify-32x/8", "EleutherAI/sae-pythia-160m-32x", "layers.8"),
    ("pythia-70m-deduped:sparsify-32k/3", "EleutherAI/sae-pythia-70m-deduped-32k", "layers.3"),
    ("llama-3.1-8b:sparsify-64x/3.mlp", "EleutherAI/sae-llama-3.1-8b-64x", "layers.3.mlp"),
    ("llama-3.2-1b:skip-transcoder-131k/3", "EleutherAI/skip-transcoder-Llama-3.2-1B-131k", "layers.3.mlp"),
    ("qwen3-8b:qwen-scope-100/5", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_100", "layer5.sae.pt"),
    ("qwen3-14b:transcoder-lowl0/7", "mwhanna/qwen3-14b-transcoders-lowl0", "layer_7.safetensors"),
    ("qwen3-4b:transcoder/7", "mwhanna/qwen3-4b-transcoders", "layer_7.safetensors"),
    ("llama-3.1-8b-instruct:andyrdt/3", "andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_3/trainer_1"),
    ("llama-3.1-8b-instruct:goodfire/19", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
    ("gpt2:hook-z-kk/1", "ckkissane/attn-saes-gpt2-small-all-layers", "gpt2-small_L1_Hcat_z_lr1.20e-03_v9.pt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "repo", "path"), NAMES)
def test_a_short_name_is_a_repo_and_a_path(name, repo, path):
    known = lookup(name)
    assert known.repo == repo
    others = ["README", path.replace("1", "7").replace("3", "9").replace("6", "8") + "x"]
    assert known.choose([*others, path]) == path


@pytest.mark.parametrize(
    "name", ["gpt2", "someone/saes:a/b", "bundled:resid_post.2", "saes:x", "gpt2:", ""]
)
def test_other_sources_are_no_short_names(name):
    assert lookup(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "gpt2:openai-33k/resid_post.6",
        "gpt2:res-jb/12",
        "gpt2:openai-32k/resid_pre.6",
        "gemma-2-2b:res/1",
    ],
)
def test_a_name_of_a_known_model_that_fits_no_pattern_says_what_does(name):
    model = name.partition(":")[0]
    with pytest.raises(
        ValueError,
        match=rf"no such short name; for {re.escape(model)} there is {re.escape(model[:4])}",
    ):
        lookup(name)


def test_of_several_l0s_the_nearest_is_meant():
    known = lookup("gemma-2-2b:gemma-scope-res-16k/12")
    paths = [f"layer_12/width_16k/average_l0_{n}" for n in (22, 82, 176, 445)]
    assert known.choose([*paths, "layer_1/width_16k/average_l0_100"]) == paths[1]
    with pytest.raises(FileNotFoundError, match="nothing in google/gemma-scope-2b-pt-res called"):
        known.choose(["layer_1/width_16k/average_l0_100"])
    with pytest.raises(FileNotFoundError, match="several in google"):
        replace(known, l0=None).choose(paths)


def test_layer_7_is_not_taken_for_layer_70():
    known = lookup("qwen3-4b:transcoder/7")
    assert known.choose(["layer_70.safetensors", "layer_7.safetensors"]) == "layer_7.safetensors"


def test_every_pattern_names_what_it_fills_in():
    assert len(releases()) > 20
    for release in releases():
        named = set(re.findall(r"\{(\w+)\}", release.name))
        spelled = {k for c in release.fields.values() for one in c.values() for k in one}
        used = {
            key
            for text in (
                release.repo,
                *release.path,
                release.model,
                release.hookpoint,
                release.target,
            )
            for key in re.findall(r"\{(\w+)\}", text or "")
        }
        assert used <= named | spelled, release.name
        assert set(release.fields) | set(release.default) <= named, release.name
        assert release.transform is None or release.transform in TRANSFORMS


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt2", "gpt2:openai-{width}/{site}.{layer}"),
        ("openai-community/gpt2", "gpt2:res-jb/{layer}"),
        ("google/gemma-2-9b-it", "gemma-2-9b-it:gemma-scope-{site}-{width}/{layer}[/{l0}]"),
        ("google/gemma-3-270m", "gemma-3-270m-pt:gemma-scope-2-{site}-{width}-{l0}/{layer}"),
        ("google/gemma-3-270m-it", "gemma-3-270m-it:gemma-scope-2-{site}-{width}-{l0}/{layer}"),
        ("google/gemma-2-2b", "gemma-2-2b:matryoshka[-{kind}]/{layer}"),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped:sparsify-{width}/{layer}"),
        ("Qwen/Qwen3-1.7B-Base", "qwen3-1.7b:qwen-scope-{l0}/{layer}"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct:goodfire/19"),
    ],
)
def test_find_lists_the_patterns_of_a_model(model, expected):
    names = [one.name for one in find(model, online=False)]
    assert expected in names
    prefix = expected.partition(":")[0]
    assert all(name.partition(":")[0] == prefix for name in names)


def test_nothing_is_known_for_a_stranger():
    assert find("nobody/nothing", online=False) == []
    assert find("gemma-2-2", online=False) == []


def test_the_command_prints_patterns_and_says_that_the_hub_was_not_asked():
    shown = CliRunner().invoke(app, ["find", "gpt2", "--offline"])
    assert shown.exit_code == 0 and "gpt2:res-jb/{layer}" in shown.output
    flat = re.sub(r"[^\w:{}./-]", "", shown.output)  # names are never cut short
    assert "{l…" not in shown.output and "gpt2:hook-z-kk/{layer}" in flat
    assert "32k, 128k" in shown.output and "0 to 11" in shown.output
    answer = json.loads(CliRunner().invoke(app, ["find", "google/gemma-2-2b", "--json"]).output)
    assert "HF_HUB_OFFLINE" in answer["hub"]  # the tests' own setting
    assert answer["found"][0]["name"].startswith("gemma-2-2b:")
    assert "No SAE is known" in CliRunner().invoke(app, ["find", "x/y", "--offline"]).output


def test_without_the_hub_the_command_prints_the_registry_and_says_so(monkeypatch):
    def get(*_, **__):
        raise HttpError("nobody there")

    monkeypatch.setattr("saert.hub.find.get_session", lambda: SimpleNamespace(get=get))
    with pytest.raises(OSError, match="the connection failed .* nobody there.: pass online=False"):
        find("gpt2")
    shown = CliRunner().invoke(app, ["find", "gpt2"])
    assert shown.exit_code == 0 and "gpt2:res-jb/{layer}" in shown.output
    assert "The Hub was not searched: " in shown.output and "nobody there" in shown.output


def test_an_unweighted_norm_is_read_from_the_residual_stream():
    """x̂ · √d/norm_in of the un-weighted norm x̂ = √d · x/‖x‖, which no module puts out."""
    sae = make("jumprelu", kind="transcoder_square", dtype=torch.float64)
    sae.input_transform = DatasetScale(0.3)
    sae.hookpoint, x = None, torch.randn(5, sae.d_in, dtype=torch.float64)
    expected = sae.encode(x * sae.d_in**0.5 / x.norm(dim=-1, keepdim=True)).to_dense()
    told = lookup("llama-3.1-8b:llama-scope-transcoder-8x/3").apply(sae)
    torch.testing.assert_close(told.encode(x).to_dense(), expected)
    assert (str(told.hookpoint), str(told.target_hookpoint)) == ("resid_mid.3", "mlp_out.3")


def test_a_scale_is_folded_as_if_the_input_were_scaled():
    scale, (sae, plain) = 0.3619728926727644, (make("relu", dtype=torch.float64) for _ in range(2))
    told = lookup("gpt2:mlp-tm/10").apply(sae)
    x = torch.randn(5, sae.d_in, dtype=torch.float64)
    mean = x.mean(-1, keepdim=True)
    scaled = (x - mean) * scale
    torch.testing.assert_close(told.pre_activations(x), plain.pre_activations(scaled))
    torch.testing.assert_close(told(x), plain(scaled) / scale + mean)
    assert lookup("gemma-2b:res-jb/6").scale == 1 != lookup("gemma-2b:res-jb/12").scale


def test_a_transform_of_the_files_is_not_replaced():
    sae = make("topk", "layer_norm", dtype=torch.float32)
    with pytest.raises(ValueError, match="its files give LayerNorm"):
        lookup("gpt2:res-jb/2").apply(sae)


@pytest.mark.parametrize("fact", ["load_as", "reads_centred"])
def test_an_sae_whose_files_leave_out_its_transform_is_not_attached_unasked(fact):
    model = tiny("gpt2")
    width = model.config.hidden_size
    metadata = {fact: "gpt2:res-jb/{layer}"}
    sae = make("topk", hookpoint="resid_pre.1", d_in=width, dtype=torch.float32, metadata=metadata)
    with pytest.raises(ValueError, match="res-jb|MeanCentre.*strict=False"):
        attach(model, sae)
    attach(model, sae, strict=False).detach()
    sae.input_transform = MeanCentre()
    attach(model, sae).detach()


CLIENT = """
import json, torch
from saert.hub.find import find
from saert.hub.load import load, load_all, load_string

sae = load("gpt2:res-jb/2")
plain = load("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.2.hook_resid_pre")
string = load_string("gpt2:res-jb/2")
every = load_all("gpt2:res-jb/2")
print(json.dumps({
    "load_as": [one.metadata.get("load_as") for one in (sae, plain)],
    "transforms": [type(one.input_transform).__name__ for one in (sae, plain, string)],
    "every": {key: [type(one.input_transform).__name__, one.metadata == sae.metadata]
              for key, one in every.items()},
    "metadata": sae.metadata, "at": str(sae.hookpoint), "W": sae.W_enc.sum().item(),
    "found": [[one.name, one.downloads] for one in find("gpt2")],
}))
"""


def test_a_short_name_loads_from_the_hub_and_tells_what_the_files_leave_out(tmp_path):
    sae = make("relu", hookpoint="resid_pre.2", dtype=torch.float32)
    assert sae.input_transform == NoTransform()
    save(sae, tmp_path / "blocks.2.hook_resid_pre")
    files = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    repo = "jbloom/GPT2-Small-SAEs-Reformatted"
    with HubServer(
        {repo: {"main": files}, "someone/gpt2-sae": {"main": {"README.md": b"#"}}}
    ) as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT], capture_output=True, text=True, timeout=120,
            env=hub.environment(tmp_path / "home"),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["transforms"] == [MeanCentre.__name__, NoTransform.__name__, MeanCentre.__name__]
    assert report["load_as"] == [None, "gpt2:res-jb/{layer}"]
    assert report["metadata"]["source"] == repo
    assert report["metadata"]["name"] == "gpt2:res-jb/2"
    assert report["metadata"]["base_model"] == "openai-community/gpt2"
    assert report["at"] == "resid_pre.2"
    assert report["every"] == {"resid_pre.2": ["MeanCentre", True]}
    assert report["W"] == pytest.approx(sae.W_enc.sum().item())
    assert ["gpt2:res-jb/{layer}", None] in report["found"]
    assert "someone/gpt2-sae" in [name for name, _ in report["found"]]


@pytest.mark.parametrize(
    "source", ["gpt2:res-jb/6", "https://huggingface.co/a/b/tree/main/x", "a/b:x", "a/b@v1:x"]
)
def test_the_command_line_takes_what_load_takes(monkeypatch, source):
    asked = []
    monkeypatch.setattr("saert.hub.session.load", asked.append)
    load_sae(source)
    assert asked == [source]
