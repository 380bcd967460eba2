"""Loading from a Hub that is slow, busy, forbidding, lying or cut off: real client, real HTTP."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import run_client
from hub_server import Fault, HubServer
from sae_cases import make
from safetensors.torch import save as save_tensors

from saert.hub.format import save
from saert.hub.formats.saelens import CONFIG, WEIGHTS

REPO = "someone/saes"
LOAD = f"fresh() and load('{REPO}', 'resid_post.0')"
REPO_MODULE = "saert.hub.sources.repo"
AGAIN = f"load('{REPO}', 'resid_post.0')"
INFO = "^GET /api/models/"
LARGE = "^GET /_lfs/"
EXPIRED = {"X-Error-Message": "Invalid credentials in Authorization header"}


def repository(folder: Path, mark: float) -> dict[str, bytes]:
    sae = make("topk", hookpoint="resid_post.0", dtype=torch.float32)
    sae.b_dec.data[0] = mark
    save(sae, folder / "resid_post.0")
    return {f"resid_post.0/{p.name}": p.read_bytes() for p in (folder / "resid_post.0").iterdir()}


def flip(content: bytes) -> bytes:
    """As many bytes, one of them another."""
    return content[:-1] + bytes([content[-1] ^ 1])


@dataclass
class Step:
    """What the client does, what goes wrong meanwhile, and how it must end."""

    code: str = LOAD
    faults: list[Fault] = field(default_factory=list)
    error: str | None = None
    text: str = ""
    mark: float = 1.0
    slept: list[float] = field(default_factory=list)
    value: Any = None


# A transcoder that its config alone makes a TopK; without one, circuit-tracer's are ReLU.
TOPK, RELU = "someone/qwen3-4b-transcoders", "someone/qwen3-14b-transcoders"
FILE = "layer_3.safetensors"
YAML = b"""model_name: Qwen/Qwen3-4B
model_kind: transcoder_set
feature_input_hook: mlp.hook_in
feature_output_hook: mlp.hook_out
activation: topk
k: 2
"""
PART = f"fresh() and hf_hub_download('{TOPK}', '{FILE}')"
KIND = "type(load({}).activation).__name__"
BRANCH = "a" * 40
WEB = f"web + '/qwen3-4b-transcoders/{FILE}'"
CONFIG_ASKED = "^GET /qwen3-4b-transcoders/config.yaml"
PAGE = {"Content-Type": "text/html"}
STORE = {"x-amz-request-id": "1"}
KNOW = "decides how the weights are read"


STEPS = {
    "nothing": Step(),
    "500 once": Step(faults=[Fault(INFO, status=500)], slept=[1]),
    "503 once for a file": Step(faults=[Fault("^HEAD .*cfg.json", status=503)]),
    "429 once": Step(
        faults=[Fault(INFO, status=429, headers={"Retry-After": "7"})], slept=[7]
    ),
    "429 for good": Step(
        faults=[Fault(INFO, times=9, status=429)],
        error="HfHubHTTPError", text="429 Too Many Requests", slept=[1, 2],
    ),
    "429 for an hour": Step(
        faults=[Fault(INFO, status=429, headers={"Retry-After": "3600"})],
        error="HfHubHTTPError", text="429 Too Many Requests",
    ),
    "no repo": Step("load('someone/nothing')", error="RepositoryNotFoundError"),
    "no revision": Step(f"load('{REPO}', revision='v9')", error="RevisionNotFoundError"),
    "no commit": Step(f"load('{REPO}', revision='{'0' * 40}')", error="RevisionNotFoundError"),
    "no entry": Step(
        faults=[Fault("^HEAD .*cfg.json", status=404, headers={"X-Error-Code": "EntryNotFound"})],
        error="RemoteEntryNotFoundError",
    ),
    "a token that expired": Step(
        faults=[Fault(INFO, status=401, headers=EXPIRED)],
        error="HfHubHTTPError", text="401 Unauthorized",
    ),
    "private": Step("fresh() and load('someone/private')", error="RepositoryNotFoundError"),
    "gated": Step("fresh() and load('someone/gated')", error="GatedRepoError"),
    "cut once": Step(faults=[Fault(LARGE, cut=1000)], slept=[1]),
    "cut for good": Step(
        faults=[Fault(LARGE, times=99, cut=0)],
        error="LocalEntryNotFoundError",
        text="sae_weights.safetensors is not cached, and the connection failed .*closed",
        slept=[1] * 5,
    ),
    "after the cut": Step(AGAIN),
    "another byte": Step(
        faults=[Fault(LARGE, change=flip)],
        error="OSError", text=f"{WEIGHTS} has the hash .* declared .* it was deleted, try again",
    ),
    "after another byte": Step(AGAIN),
    "another byte in a config": Step(
        faults=[Fault("^GET .*cfg.json", change=flip)],
        error="OSError", text=f"{CONFIG} has the hash .* declared",
    ),
    "cut short, and says so": Step(
        faults=[Fault(LARGE, change=lambda content: content[:1000])],
        error="OSError", text="came with another size than the .* bytes that the Hub declares",
    ),
    "cut short everywhere": Step(
        faults=[Fault("^(HEAD|GET) .*cfg.json", times=2, change=lambda content: content[:100])],
        error="OSError", text="came with 100 bytes, but the Hub declares",
    ),
    "a huge config": Step(
        "fresh() and load('someone/huge')",
        error="OSError", text=r"cfg.json has 4194305 bytes, expected a config of at most 4194304",
    ),
    "a full disk": Step(
        f"fresh() and full_disk() and load('{REPO}', 'resid_post.0')",
        error="OSError", text="has room for .* set HF_HOME to a larger disk",
    ),
    "slow": Step(
        f"fresh() and patch('{REPO_MODULE}.TIMEOUT', 0.2) and load('{REPO}', 'resid_post.0')",
        faults=[Fault(INFO, delay=0.6)],
        error="LocalEntryNotFoundError", text="'main' is not cached, and the .*ReadTimeout",
    ),
    "a list cut short": Step(
        f"fresh() and patch('{REPO_MODULE}.MOST_SIBLINGS', 1) and load('{REPO}', 'resid_post.0')"
    ),
    "a part is cached, and busy": Step(
        f"{PART} and load('{TOPK}', '{FILE}')", faults=[Fault(INFO, times=9, status=503)],
        error="LocalEntryNotFoundError", slept=[1, 2],
        text=f"not known whether {FILE} has config.yaml .*, and the server answers 503",
    ),
    "a part is cached": Step(
        f"{PART} and offline(True) and load('{TOPK}', '{FILE}')", error="LocalEntryNotFoundError",
        text=f"not known whether {FILE} has config.yaml or .*, and HF_HUB_OFFLINE is set. Load it",
    ),
    "the only one of a part": Step(
        f"load('{TOPK}')", error="LocalEntryNotFoundError", text="not known whether .*config.yaml"
    ),
    "all of a part": Step(
        f"load_all('{TOPK}')", error="LocalEntryNotFoundError", text="whether .*config.yaml"
    ),
    "none of a part": Step(
        f"load('{TOPK}', 'x')", error="LocalEntryNotFoundError", text="which SAEs there are"
    ),
    "a short name of a part": Step(
        "fresh() and offline(False) and hf_hub_download('google/gemma-scope-2b-pt-res', "
        "'layer_3/width_16k/average_l0_9/params.npz') and offline(True) "
        "and load('gemma-2-2b:gemma-scope-res-16k/3')",
        error="LocalEntryNotFoundError", text="which SAEs there are",
    ),
    "a snapshot of the client's": Step(
        "fresh() and offline(False) and __import__('huggingface_hub').snapshot_download("
        f"'{REPO}') and offline(True) and __import__('warnings').simplefilter('ignore') or "
        f"sorted(load_all('{REPO}')) + [str(load('{REPO}', 'resid_post.0').hookpoint)]",
        value=["resid_post.0", "resid_post.0"],
    ),
    "the file of a part": Step(
        f"offline(False) and {PART} and load(hf_hub_download('{TOPK}', '{FILE}'))",
        error="LocalEntryNotFoundError", text=f"not known whether {FILE} has config.yaml",
    ),
    "what the client knows is not there": Step(
        f"fresh() and hf_hub_download('{RELU}', '{FILE}') and ["
        f"__import__('transformers').utils.cached_file('{RELU}', one + 'config.yaml', "
        "_raise_exceptions_for_missing_entries=False) for one in ('', 'wandb-', 'wanb-')] "
        "and offline(True) and " + KIND.format(f"'{RELU}', '{FILE}'"),
        value="ReLU",
    ),
    "a part is completed": Step(
        f"offline(False) and {PART} and " + KIND.format(f"'{TOPK}'"), value="TopK"
    ),
    "a list is kept": Step(
        f"offline(True) and [{KIND.format(repr(TOPK))}, "
        + KIND.format(f"hf_hub_download('{TOPK}', '{FILE}')") + "]",
        value=["TopK", "TopK"],
    ),
    "a branch like a commit": Step(
        f"offline(False) and fresh() and load('{REPO}', 'resid_post.0', revision='{BRANCH}')",
        mark=2.0,
    ),
    "a branch like a commit, offline": Step(
        f"offline(True) and load('{REPO}', 'resid_post.0', revision='{BRANCH}')", mark=2.0
    ),
    "a login page": Step(
        f"offline(False) and fresh() and load('{REPO}', 'resid_post.0')",
        faults=[Fault(INFO, change=lambda _: b"<html>log in</html>")],
        error="LocalEntryNotFoundError", text="'main' is not cached, and the .*login page",
    ),
    "no Hub": Step(
        AGAIN, faults=[Fault(INFO, change=lambda _: b"{}")],
        error="LocalEntryNotFoundError", text="'main' is not cached, and the .*login page",
    ),
    "before a login page": Step(),
    "a login page, cached": Step(
        AGAIN, faults=[Fault(INFO, change=lambda _: b"<html>log in</html>")]
    ),
    "a strange list": Step(
        "[one.write_text('123') for one in home.rglob('listings/*/*.json')] and " + AGAIN
    ),
    "files that others may read": Step(
        f"os.umask(0o002) and fresh() and load('{REPO}', 'resid_post.0') and load({WEB}) and "
        "sorted({oct(one.stat().st_mode & 0o777) for folder in ('saert', 'hub/models--*/refs') "
        "for top in home.glob(folder) for one in top.rglob('*') if one.is_file()})",
        value=["0o664"],
    ),
    "a config refused": Step(
        f"fresh() and load({WEB})", faults=[Fault(CONFIG_ASKED, status=403)],
        error="OSError", text=f"config.yaml: the server answers 403.*{KNOW}",
    ),
    "a config without a login": Step(
        f"load({WEB})", faults=[Fault(CONFIG_ASKED, status=401)], error="OSError", text=KNOW
    ),
    "a config that is a page": Step(
        f"load({WEB})", faults=[Fault(CONFIG_ASKED, status=200, headers=PAGE)],
        error="OSError", text=f"answers a web page.*{KNOW}",
    ),
    "a config after all": Step(KIND.format(WEB), value="TopK"),
    "a config that was there": Step(
        "[one.unlink() for one in home.rglob('about.json') if 'layer' in one.read_text()] and "
        f"load({WEB})", faults=[Fault(CONFIG_ASKED, status=403, headers=STORE)],
        error="OSError", text=KNOW,
    ),
    "a store that may not say": Step(
        f"fresh() and {KIND.format(WEB)}",
        faults=[Fault(CONFIG_ASKED, status=403, headers=STORE)], value="ReLU",
    ),
    "a store that says": Step(KIND.format(WEB), value="TopK"),
    "a signed address": Step(
        f"fresh() and load({WEB} + '?sig=x')",
        faults=[Fault(CONFIG_ASKED, status=403, headers=STORE)], error="OSError", text=KNOW,
    ),
    "a redirect to nowhere": Step(
        f"load({WEB})",
        faults=[Fault("^GET /qwen3-4b-transcoders/layer", status=302, headers={"Location": "http://[bad"})],
        error="OSError", text=f"/qwen3-4b-transcoders/{FILE}: redirected to no address",
    ),
    "a redirect with a password": Step(
        f"load({WEB})",
        faults=[Fault("^GET /qwen3", status=302, headers={"Location": "http://u:pw@localhost/x"})],
        error="OSError", text=r"redirected to no address, or with a user name$",
    ),
    "find": Step(f"'{TOPK}' in [one.name for one in find('x/topk', limit=3)]", value=True),
    "find, busy": Step(
        "find('x/topk')", faults=[Fault("^GET /api/models$", times=9, status=503)],
        error="ConnectionError", text="the server answers 503: pass online=False", slept=[1, 2],
    ),
    "find, a login page": Step(
        "find('x/topk')", faults=[Fault("^GET /api/models$", change=lambda _: b"<html>")],
        error="ConnectionError", text="login page",
    ),
    "find, too slow": Step(
        "patch('saert.hub.find.TIMEOUT', 0.2) and find('x/topk')",
        faults=[Fault("^GET /api/models$", delay=0.6)], error="ConnectionError", text="ReadTimeout",
    ),
    "find, no connection": Step(
        "patch('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9') and find('x/topk')",
        error="ConnectionError", text="the connection failed .ConnectError",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[HubServer, dict[str, dict[str, Any]]]:
    tmp = tmp_path_factory.mktemp("hub")
    good = repository(tmp / "main", 1.0)
    huge = good | {f"resid_post.0/{CONFIG}": b" " * (4 << 20) + b"{"}
    repos = {REPO: good, "someone/private": good, "someone/gated": good, "someone/huge": huge}
    layer = transcoder()
    repos |= {TOPK: {FILE: layer, "config.yaml": YAML}, RELU: {FILE: layer}}
    repos["google/gemma-scope-2b-pt-res"] = {"layer_3/width_16k/average_l0_9/params.npz": b"x"}
    steps = {name: step.code for name, step in STEPS.items()}
    with HubServer({name: {"main": files} for name, files in repos.items()}) as hub:
        hub.repos[REPO][BRANCH] = repository(tmp / "branch", 2.0)
        hub.web = {f"/qwen3-4b-transcoders/{name}": one for name, one in repos[TOPK].items()}
        hub.private.add("someone/private")
        hub.gated.add("someone/gated")
        hub.steps = {name: plant(hub, step.faults) for name, step in STEPS.items()}
        report = run_client(hub, tmp / "home", steps, HF_HUB_ETAG_TIMEOUT="5")
    return hub, report


def transcoder() -> bytes:
    W_enc = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    zeros = {"b_enc": torch.zeros(32), "b_dec": torch.zeros(8)}
    return save_tensors({"W_enc": W_enc, "W_dec": W_enc.clone(), **zeros})


def plant(hub: HubServer, faults: list[Fault]) -> Callable[[], None]:
    def now() -> None:
        hub.faults = faults

    return now


@pytest.mark.parametrize("name", STEPS)
def test_every_step_ends_as_it_must(run, name):
    step, found = STEPS[name], run[1][name]
    if step.value is not None:
        assert found.get("value", found.get("trace")) == step.value
    elif step.error is None:
        assert found.get("sae", found.get("text"))["mark"] == step.mark, found
    else:
        assert step.error in found["error"], found["trace"]
        assert re.search(step.text, found["text"], re.DOTALL), found["text"]
    assert found["slept"] == pytest.approx(step.slept, abs=1.01)
    assert found["left"] == []


def test_only_what_the_hub_calls_a_commit_is_kept_as_one(run):
    hub, report = run
    found = report["a branch like a commit"]
    commit = hub.commit(REPO, BRANCH)
    assert found["sae"]["metadata"]["revision"] == commit != BRANCH
    listings = [one for one in found["files"] if "listings/" in one]
    assert [Path(one).stem for one in listings] == [commit]
