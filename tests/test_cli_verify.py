"""`saert verify`: what it prints, its exit codes, and what it does without data."""

import json

import pytest
import torch
from typer.testing import CliRunner

from saert.activations import TopK
from saert.cli import app
from saert.hub import bundled
from saert.hub.format import save
from saert.hub.verify import verify
from saert.hub.verifying.readings import changed


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    story = "Once upon a time, Tom saw {} birds in a tree. He was happy to see them fly away."
    path.write_text("\n".join(json.dumps({"text": story.format(i)}) for i in range(40)))
    return str(path)


def run(*arguments):
    small = ["--tokens", "150", "--context", "48"]
    return CliRunner().invoke(app, ["verify", *(str(a) for a in arguments), *small])


def test_a_right_sae_exits_0_and_the_numbers_are_those_of_verify(text):
    pytest.importorskip("datasets")
    found = run("bundled:resid_post.2", "--data", text, "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert answer["ok"] and answer["cause"] is None and answer["text"] == text
    assert answer["sae"] == "bundled:resid_post.2" and answer["model"] == "bundled"
    from saert._cli_text import read_text
    from saert.hub.session import open_session

    session = open_session(None, ["bundled:resid_post.2"])
    rows = read_text(session, [text], 4, 48).rows
    direct = verify(
        session.saes[0].sae, session.model, rows, tokenizer=session.tokenizer, tokens=150
    )
    assert json.loads(json.dumps(direct.to_dict())) == {
        key: answer[key] for key in direct.to_dict()
    }


def test_without_arguments_the_bundled_sae_is_verified_on_the_models_own_text():
    found = run()
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "text that the model wrote itself" in said and "no mismatch" in said
    assert "resid_post.2" in said and "0.1189" in said


def test_a_mismatch_exits_1_and_names_the_cause(tmp_path):
    save(changed(bundled.sae("resid_post.2"), activation=TopK(64)), tmp_path)
    found = run(tmp_path, "-m", "bundled")
    assert found.exit_code == 1, found.output
    said = " ".join(found.output.split())
    assert "✗ l0" in said and "probable cause: TopK(k=16)" in said and said.endswith("mismatch")
    found = run(tmp_path, "-m", "bundled", "--on-mismatch", "warn", "--json")
    assert found.exit_code == 0
    answer = json.loads(found.stdout)
    assert not answer["ok"] and "TopK(k=16)" in answer["cause"]
    found = run("bundled:resid_post.1", "--hookpoint", "resid_post.2", "--json")
    assert found.exit_code == 1 and "resid_post.1" in json.loads(found.stdout)["cause"]


def test_weights_that_contradict_themselves_exit_1_without_a_run(tmp_path):
    sae = bundled.sae("resid_post.2")
    wrong = changed(sae, W_dec=sae.W_dec * 2)
    wrong.metadata["declared"] = {"unit_norm_decoder": True}
    save(wrong, tmp_path)
    found = run(tmp_path, "-m", "bundled", "--json")
    assert found.exit_code == 1, found.output
    answer = json.loads(found.stdout)
    assert answer["tokens"] == 0 and answer["text"] is None
    assert [check["fact"] for check in answer["checks"] if not check["ok"]] == [
        "norm of W_dec rows"
    ]
    assert run(tmp_path, "-m", "bundled", "--on-mismatch", "warn").exit_code == 0


def test_expectations():
    found = run("bundled:resid_post.2", "--expect", "l0=30", "--expect", "fvu=0.13", "--json")
    assert found.exit_code == 1
    checks = {check["fact"]: check for check in json.loads(found.stdout)["checks"]}
    assert checks["l0"]["declared"] == 30 and not checks["l0"]["ok"]
    assert checks["fvu"]["declared"] == 0.13 and checks["fvu"]["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundled:resid_post.9"], "resid_post.9"),
        (["--expect", "l0"], "expected FACT=NUMBER"),
        (["--expect", "l0=many"], "expected FACT=NUMBER"),
        (["--expect", "size=3"], "unknown facts"),
        (["--hookpoint", "resid_post.7"], "layers 0 to 3"),
        (["--data", "no-such.jsonl"], "no-such"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(arguments, message):
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.output.split()) and "Traceback" not in found.output


def test_the_sae_is_untouched():
    sae = bundled.sae("resid_post.2")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    verify(sae, bundled.model(), tokens=50)
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())
