"""The command line: what it prints is what the runtime computes, and its errors are one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from saert import SAE, ReLU, TopK, add, attach, save
from saert._cli_edits import read_edits, read_positions
from saert.cli import app
from saert.hub import bundled
from saert.hub.session import UserError, open_session

PROMPT = "the dog ran to the park"
WORDS = "the dog ran to the park and the cat sat on the red mat with a big ball in the sun"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny model and three SAEs: at layer 0, at layer 1, and one that fits nothing."""
    root = tmp_path_factory.mktemp("local")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        root / "model"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=48,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.4,
    )
    GPT2LMHeadModel(config).save_pretrained(root / "model")
    for name, width, activation, at in (
        ("zero", 16, TopK(4), "resid_post.0"),
        ("one", 16, ReLU(), "resid_post.1"),
        ("wide", 24, TopK(4), "resid_post.1"),
    ):
        weights = torch.randn(64, width)
        save(
            SAE.from_weights(
                weights,
                weights / width,
                activation=activation,
                hookpoint=at,
                metadata={"metrics": {"fvu": 0.25}, "base_model": "tiny"},
            ),
            root / "saes" / name,
        )
    labels = {"3": {"label": "animals", "max_activation": 2.0, "density": 0.1}}
    (root / "saes" / "zero" / "labels.json").write_text(json.dumps(labels))
    return root


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def answer(*args):
    """The JSON answer of a command; nothing else may be on standard output."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def on(local, *saes):
    args = ["--model", local / "model", "--device", "cpu"]
    for name in saes or ("zero",):
        args += ["--sae", f"{local / 'saes'}:{name}"]
    return args


@pytest.fixture(scope="module")
def session(local):
    return open_session(str(local / "model"), [f"{local / 'saes'}:zero"], device="cpu")


# -- features ------------------------------------------------------------------------------------


def test_features_are_the_codes_of_a_forward_pass(local, session):
    (found,) = answer("features", PROMPT, "--top", 2, "--latent", 3, *on(local))["features"]
    inputs = session.tokenizer(PROMPT, return_tensors="pt")
    with attach(session.model, session.saes[0].sae) as attachment, torch.no_grad():
        session.model(**inputs)
    dense = attachment.codes["resid_post.0"][0].to_dense()
    assert len(found["tokens"]) == len(dense)
    assert "".join(token["text"] for token in found["tokens"]) == PROMPT
    for token, row in zip(found["tokens"], dense, strict=True):
        values, latents = row.topk(2)
        shown = token["latents"]
        assert [one["latent"] for one in shown] == latents[values > 0].tolist()
        assert [one["activation"] for one in shown] == values[values > 0].tolist()
        assert token["l0"] == int((row != 0).sum())
    assert found["traced"] == {"3": dense[:, 3].tolist()}
    assert found["report"]["tokens"] == len(dense)


def test_labels_beside_a_local_sae_are_shown(local):
    found = answer("features", PROMPT, "--top", 64, *on(local))["features"][0]
    labels = {one["label"] for t in found["tokens"] for one in t["latents"] if one["latent"] == 3}
    assert labels <= {"animals"}
    assert "animals" in invoke("features", PROMPT, "--latent", 3, *on(local)).stdout


def test_features_of_several_saes(local):
    found = answer("features", PROMPT, "--latent", "resid_post.1/5", *on(local, "zero", "one"))
    first, second = found["features"]
    assert (first["hookpoint"], second["hookpoint"]) == ("resid_post.0", "resid_post.1")
    assert first["traced"] == {} and set(second["traced"]) == {"5"}


def test_the_table_has_a_row_per_token(local):
    shown = invoke("features", PROMPT, *on(local)).stdout
    assert all(word in shown for word in ("resid_post.0", "strongest latents", "FVU"))
    rows = [line for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) >= len(answer("features", PROMPT, *on(local))["features"][0]["tokens"])


# -- generate ------------------------------------------------------------------------------------


def stepwise(session, prompt_ids, ids, edits=None):
    """Log-probability of each id, by a forward pass of the whole text per token."""
    found = []
    for t, token in enumerate(ids):
        text = torch.tensor([[*prompt_ids, *ids[:t]]])
        if edits is None:
            logits = session.model(text).logits
        else:
            with attach(session.model, session.saes[0].sae, edits):
                logits = session.model(text).logits
        found.append(float(logits[0, -1].log_softmax(-1)[token]))
    return found


@torch.no_grad()
def test_generate_reports_both_models_on_the_edited_tokens(local, session):
    found = answer("generate", PROMPT, "--add", "7:3", "--tokens", 6, *on(local))
    prompt = session.tokenizer(PROMPT)["input_ids"]
    assert found["edits"][0] | {"op": "add", "latents": [7], "amount": 3.0} == found["edits"][0]
    for name, edits in (("baseline", None), ("edited", [add(7, 3.0)])):
        tokens = found[name]["tokens"]
        ids = [token["id"] for token in tokens]
        logprobs = torch.tensor([token["logprob"] for token in tokens])
        bare = torch.tensor([token["bare_logprob"] for token in tokens])
        change = torch.tensor([token["change"] for token in tokens])
        torch.testing.assert_close(logprobs, torch.tensor(stepwise(session, prompt, ids, edits)))
        torch.testing.assert_close(bare, torch.tensor(stepwise(session, prompt, ids)))
        torch.testing.assert_close(change, logprobs - bare)
    assert found["edited"]["text"] != found["baseline"]["text"]
    assert found["baseline"]["report"] == {}
    assert found["edited"]["report"]["resid_post.0"]["tokens"] == len(prompt) + 5


def test_without_edits_the_continuation_is_the_baseline(local):
    found = answer("generate", PROMPT, "--tokens", 5, *on(local))
    assert found["edited"]["text"] == found["baseline"]["text"]
    logprobs = [[t["logprob"] for t in found[name]["tokens"]] for name in ("baseline", "edited")]
    assert logprobs[0] == logprobs[1]


def test_splice_alone_changes_the_continuation(local):
    found = answer("generate", PROMPT, "--splice", "--tokens", 5, *on(local))
    changes = [abs(token["change"]) for token in found["edited"]["tokens"]]
    assert found["splice"] is True and max(changes) > 1e-3


def test_edits_on_the_prompt_only_leave_later_positions_alone(local):
    everywhere = answer("generate", PROMPT, "--add", "7:3", "--tokens", 4, *on(local))
    later = answer(
        "generate", PROMPT, "--add", "7:3", "--tokens", 4, "--phase", "generated", *on(local)
    )
    assert later["edits"][0]["phase"] == "generated"
    # the first new token is drawn at the last prompt position, which is not edited
    assert later["edited"]["tokens"][0]["change"] == pytest.approx(0.0, abs=1e-5)
    assert abs(everywhere["edited"]["tokens"][0]["change"]) > 1e-3


def test_the_same_seed_draws_the_same_tokens(local):
    def run(seed):
        args = ["generate", PROMPT, "--sample", "--tokens", 8, "--seed", seed]
        return answer(*args, *on(local))["baseline"]["text"]

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(4)}) > 1


def test_generate_shows_both_continuations(local):
    result = invoke("generate", PROMPT, "--add", "7:3", "--tokens", 4, *on(local))
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("baseline", "edited", "Δ log p", "L0", "FVU"))


def test_options_become_edits(local, session):
    edits = read_edits(
        session,
        add_=["1:2"],
        clamp_=["2:0.5"],
        scale_=["resid_post.0/3:-1"],
        ablate_=["4", "5,6:0.25", "blocks.0.hook_resid_post/7"],
        positions="-1",
        phase="prompt",
    )
    found = [(edit.op.name, edit.latents, edit.amount) for edit in edits]
    assert found == [
        ("ADD", (1,), 2.0),
        ("SET", (2,), 0.5),
        ("SCALE", (3,), -1.0),
        ("SET", (4,), 0.0),
        ("SET", (5, 6), 0.25),
        ("SET", (7,), 0.0),
    ]
    assert {edit.select.positions for edit in edits} == {(-1,)}
    assert {edit.select.phase for edit in edits} == {"prompt"}


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        (None, None),
        ("3", 3),
        ("-1", -1),
        ("0, 4", [0, 4]),
        ("2:10", slice(2, 10)),
        (":5", slice(None, 5)),
        ("::2", slice(None, None, 2)),
    ],
)
def test_positions(text, positions):
    assert read_positions(text) == positions


@pytest.mark.parametrize("text", ["", "a", "1.5", "1:2:3:4", "1,,2"])
def test_positions_that_cannot_be_meant(text):
    with pytest.raises(UserError, match="--positions"):
        read_positions(text)


# -- info ----------------------------------------------------------------------------------------


def test_info_of_a_folder(local):
    (found,) = answer("info", f"{local / 'saes'}:zero")["saes"]
    expected = {
        "hookpoint": "resid_post.0",
        "target_hookpoint": None,
        "d_in": 16,
        "num_latents": 64,
        "d_out": 16,
        "dtype": "float32",
        "activation": {"type": "TopK", "k": 4},
        "labels": 1,
        "metrics": {"fvu": 0.25},
    }
    assert found | expected == found
    assert found["parameters"] == 2 * 64 * 16 + 64 + 16  # the layout stores biases of zero
    assert found["bytes"] == 4 * found["parameters"]
    assert found["metadata"]["base_model"] == "tiny"
    shown = invoke("info", local / "saes" / "zero").stdout
    assert "TopK" in shown and "resid_post.0" in shown


def test_info_says_whether_it_fits_a_model(local):
    args = ["info", *(f"{local / 'saes'}:{name}" for name in ("zero", "wide"))]
    fits, wide = answer(*args, "--model", local / "model")["saes"]
    assert fits["fits"] is True and fits["at"] == "transformer.h.0"
    assert wide["fits"] is False and "24" in wide["why"] and "16" in wide["why"]


# -- errors --------------------------------------------------------------------------------------

FEATURES = ["features", PROMPT]
GENERATE = ["generate", PROMPT, "--tokens", "4"]


@pytest.mark.parametrize(
    ("command", "saes", "said"),
    [
        ([*GENERATE, "--add", "7"], ["zero"], "expected LATENT:AMOUNT"),
        ([*GENERATE, "--add", "7:x"], ["zero"], "'x' is no number"),
        ([*GENERATE, "--add", "dog:1"], ["zero"], "expected latents as numbers"),
        ([*GENERATE, "--add", "1,2:3"], ["zero"], "expected LATENT:AMOUNT"),
        ([*GENERATE, "--add", "7:inf"], ["zero"], "finite"),
        ([*GENERATE, "--ablate", "64"], ["zero"], "64 latents, 0 to 63"),
        ([*GENERATE, "--ablate", "3,3"], ["zero"], "listed twice"),
        ([*GENERATE, "--add", "resid_post.1/7:1"], ["zero"], "attached: resid_post.0"),
        ([*GENERATE, "--add", "resid_pots.1/7:1"], ["zero"], "resid_post"),
        ([*GENERATE, "--add", "7:1"], ["zero", "one"], "--add resid_post.0/7:1"),
        ([*GENERATE, "--add", "7:1", "--positions", "x"], ["zero"], "--positions x"),
        (["generate", PROMPT, "--tokens", "64"], ["zero"], "holds 48"),
        (["features", ""], ["zero"], "no tokens"),
        (["features", "dog " * 60], ["zero"], "holds 48"),
        ([*FEATURES, "--latent", "99"], ["zero"], "0 to 63"),
        ([*FEATURES, "--latent", "3:1"], ["zero"], "expected one latent"),
        (FEATURES, ["wide"], "24"),
        (FEATURES, ["noughts"], "zero"),  # the listing of what there is
        ([*FEATURES, "--device", "gpu"], ["zero"], "expected cpu, cuda"),
        ([*FEATURES, "--device", "cuda:99"], ["zero"], "CUDA devices here"),
        ([*FEATURES, "--hookpoint", "resid_post.9"], ["zero"], "resid_post.9"),
        ([*FEATURES, "--hookpoint", "resid_post.1"], ["zero", "one"], "single SAE"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(local, command, saes, said):
    name, *options = command
    result = invoke(name, *on(local, *saes), *options)
    assert result.exit_code == 2
    assert result.stdout == "" and result.stderr.startswith("error: ")
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "{root}/modle", "--sae", "{root}/saes:zero"], "nearest: model"),
        (["--model", "{root}/model"], "Add --sae"),
        (["--model", "{root}/model", "--sae", "{root}/sae:zero"], "nearest: saes"),
        (["--model", "{root}/model", "--sae", "{root}/saes"], "which SAE"),
        (["--sae", "bundled:resid_pots.2"], "resid_pots.2"),
    ],
)
def test_sources_that_are_not_there(local, args, said):
    result = invoke("features", PROMPT, *(arg.format(root=local) for arg in args))
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr


def test_a_broken_file_is_named(local, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(local / "saes" / "zero", folder)
    (folder / "sae_weights.safetensors").write_bytes(b"junk")
    result = invoke("info", folder)
    assert result.exit_code == 2 and result.stdout == ""
    assert "broken" in result.stderr and "Traceback" not in result.stderr


def test_an_unreachable_hub_is_no_traceback(monkeypatch):
    def refuse(*args, **kwargs):
        raise httpx_error("Name or service not known")

    base = next(c for c in HfHubHTTPError.__mro__ if c.__module__.startswith("httpx"))
    httpx_error = type("ConnectError", (base,), {"__module__": base.__module__})
    monkeypatch.setattr("saert.hub.session.load", refuse)
    result = invoke("info", "nobody/nothing")
    assert result.exit_code == 2 and "nobody/nothing: Name or service" in result.stderr


def test_an_sae_of_another_model_is_refused_unless_told_otherwise(local, tmp_path):
    weights = torch.randn(8, 16)
    other = SAE.from_weights(
        weights,
        weights,
        activation=TopK(2),
        hookpoint="resid_post.0",
        metadata={"base_model": "x", "base_model_config": {"num_hidden_layers": 7}},
    )
    save(other, tmp_path / "other")
    args = ["features", PROMPT, "--model", local / "model", "--sae", tmp_path / "other"]
    result = invoke(*args)
    assert result.exit_code == 2 and "num_hidden_layers" in result.stderr
    assert "--no-strict" in result.stderr
    assert invoke(*args, "--no-strict").exit_code == 0


def test_debug_shows_where_an_error_came_from(local, monkeypatch):
    monkeypatch.setenv("SAERT_DEBUG", "1")
    with pytest.raises(UserError):
        invoke(*GENERATE, "--add", "7", *on(local))


# -- help and the bundled default ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "generate", "features", "info"])
def test_help_shows_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"saert {command}" in result.stdout.split("Examples", 1)[1]
    assert all(option in result.stdout for option in ("--json", "--model", "--sae"))


def test_demo_on_a_local_model(local):
    found = answer("demo", "--prompt", PROMPT, "--tokens", 4, *on(local))
    assert found["overhead"]["identical"] is True
    assert found["steered"]["edit"]["op"] == "add" and found["ablated"]["edit"]["op"] == "set"
    assert found["steered"]["tokens"] and found["baseline"]["tokens"]


def test_demo_on_what_is_bundled():
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    assert all(word in shown for word in ("baseline", "steered", "ablated", "L0", "bit-identical"))
    found = answer("demo")
    assert found["model"] == "bundled" and found["overhead"]["identical"] is True
    assert found["steered"]["text"] != found["baseline"]["text"] != found["ablated"]["text"]
    assert found["steered"]["edit"]["labels"] == ["food"]


def test_info_of_what_is_bundled():
    found = answer("info")
    assert [fact["source"] for fact in found["saes"]] == [
        f"bundled:{name}" for name in bundled.HOOKPOINTS
    ]
    assert found["model"]["layers"] and all(fact["metrics"] for fact in found["saes"])
    assert "bundled:" in invoke("info").stdout


def test_bundled_edits_by_option():
    found = answer("generate", "The dog", "--tokens", 4, "--add", "0:4", "--sae", "bundled")
    assert found["saes"][0]["source"] == f"bundled:{bundled.DEMO.hookpoint}"


def test_a_real_process_prints_json_alone():
    command = [sys.executable, "-c", "from saert.cli import app; app()"]
    done = subprocess.run(
        [*command, "features", "The dog", "--top", "1", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "bundled"
    assert done.stderr == ""
