"""`saert app`, the Space, and what both need to start."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from saert.cli import app

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
run = CliRunner().invoke


@pytest.fixture
def launched(monkeypatch):
    """What `saert app` would serve, without serving it."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")
    calls = []
    monkeypatch.setattr(
        "saert.demos.app.launch", lambda *args, **options: calls.append((*args, options))
    )
    return calls


def test_help_has_examples():
    said = re.sub(r"\x1b\[[0-9;]*m", "", run(app, ["app", "--help"]).output)
    assert "saert app --open" in said and "--features" in said and "--share" in said


def test_all_bundled_saes_with_the_labelled_one_first(launched):
    assert run(app, ["app"]).exit_code == 0
    ((session, features, loads, options),) = launched
    sources = [one.source for one in session.saes]
    assert sources[0] == "bundled:resid_post.2" and len(set(sources)) == len(sources) == 5
    assert features is None and loads == "anything"  # nobody but this machine may come
    assert options == {
        "server_name": "127.0.0.1", "server_port": None, "share": False, "inbrowser": False,
    }  # fmt: skip


def test_options_reach_the_app(launched, tmp_path):
    options = ["--sae", "bundled:mlp_in.2", "--port", "7959", "--host", "0.0.0.0", "--open"]
    assert run(app, ["app", *options, "--features", str(tmp_path), "--no-strict"]).exit_code == 0
    ((session, features, loads, options),) = launched
    assert loads == "nothing"  # others may come
    assert [one.source for one in session.saes] == ["bundled:mlp_in.2"] and not session.strict
    assert features == tmp_path
    assert options["server_port"] == 7959 and options["inbrowser"] is True


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--host localhost", "anything"),
        ("--host 127.0.0.2", "anything"),
        ("--host ::1 --any-sae", "anything"),
        ("--no-any-sae", "nothing"),
        ("--share", "nothing"),
        ("--host 192.168.1.7", "nothing"),
        ("--host example.org", "nothing"),
        ("--host :: --any-sae", "hub"),
        ("--share --any-sae", "hub"),
    ],
)
def test_strangers_load_nothing_unless_allowed_and_then_from_the_hub(launched, options, expected):
    assert run(app, ["app", "-s", "bundled:mlp_in.2", *options.split()]).exit_code == 0
    assert launched[0][2] == expected


@pytest.mark.parametrize("asked", [None, "1"])
def test_a_space_loads_nothing_else_unless_allowed(launched, monkeypatch, asked):
    from saert.demos.app import main

    monkeypatch.setenv("SAERT_SAE", "bundled:mlp_in.2")
    if asked:
        monkeypatch.setenv("SAERT_ANY_SAE", asked)
    main()
    assert launched[0][2] == ("hub" if asked else "nothing")


def interruptible() -> None:
    """Hear SIGINT also where the shell that runs the tests is in the background, and ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_it_ends_in_peace_while_it_reads_in_the_background(tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")
    command = [sys.executable, "-c", "from saert.cli import app; app()", "app", "-s", "bundled"]
    process = subprocess.Popen(
        command, env={**os.environ, "SAERT_CACHE": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=interruptible,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if "http://" in line:
                break
        deadline = time.monotonic() + 30
        while not (tmp_path / "text").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert not list((tmp_path / "text").glob("*.safetensors")), "it was not at work"
        assert process.returncode == 0 and "terminate" not in said and "Traceback" not in said, said
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sae", "bundled:resid_post.9"], "resid_post.9"),
        (["--model", "./no-such-model", "--sae", "bundled:mlp_in.2"], "no-such-model"),
        (["--features", "./no-such-folder"], "no-such-folder"),
        (["--model", "gpt2"], "which SAE?"),
    ],
)
def test_mistakes_are_one_line(launched, options, words):
    outcome = run(app, ["app", *options])
    assert outcome.exit_code == 2 and words in outcome.output
    assert "Traceback" not in outcome.output and not launched


def test_without_gradio_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("saert.demos")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    outcome = run(app, ["app"])
    assert outcome.exit_code == 2 and "pip install 'saert[demo]'" in outcome.output


def test_a_port_that_is_taken_is_said(monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = run(app, ["app", "--sae", "bundled:resid_post.2", "--port", str(port)])
    assert outcome.exit_code == 2 and str(port) in outcome.output


def test_the_space_is_configured_for_what_we_test():
    head = (ROOT / "demos" / "README.md").read_text().split("---\n")[1]
    facts = yaml.safe_load(head)
    pins = dict(
        line.split("#")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert facts["sdk"] == "gradio" and facts["sdk_version"] == pins["gradio"]
    assert (ROOT / "demos" / facts["app_file"]).is_file()
    assert facts["license"] == PYPROJECT["project"]["license"].lower()
    assert len(facts["short_description"]) <= 60
    needs = (ROOT / "demos" / "requirements.txt").read_text().splitlines()[1:]
    assert needs == [re.sub(r" +#.*", "", one) for one in PYPROJECT["project"]["dependencies"]]


@pytest.mark.slow
def test_a_space_runs_from_a_folder_of_its_own(tmp_path):
    """As `make space` lays it out: app.py beside the package, nothing of the checkout in sight."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")
    client = pytest.importorskip("gradio_client")
    folder = tmp_path / "space"
    shutil.copytree(
        ROOT / "saert", folder / "saert", ignore=shutil.ignore_patterns("__pycache__")
    )  # fmt: skip
    shutil.copy(ROOT / "demos" / "app.py", folder)
    environment = {
        **os.environ, "SAERT_MODEL": "bundled", "SAERT_SAE": "bundled:resid_post.1",
        "PYTHONSAFEPATH": "", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=interruptible,
    )  # fmt: skip
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line:
                break
        url = re.search(r"http://\S+", "".join(said))
        assert url, "".join(said)
        asked = client.Client(url[0], verbose=False)
        seen = asked.predict("The dog", "bundled:resid_post.1", api_name="/look")
        assert [token["text"] for token in seen["tokens"]][-1] == " dog"
        assert seen["tokens"][-1]["latents"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
