"""What all visitors share: which SAEs they may load, and that none keeps the others waiting."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from saert.demos import gather as gather_module  # noqa: E402
from saert.demos import workbench as workbench_module  # noqa: E402
from saert.demos.app import LAUNCH, QUEUE, build  # noqa: E402
from saert.demos.gather import Gathering, Worker  # noqa: E402
from saert.demos.workbench import AT_ONCE, KEPT, LONGEST, Workbench  # noqa: E402
from saert.hub import bundled, public  # noqa: E402
from saert.hub.session import Loaded, UserError, canonical, load_sae, open_session  # noqa: E402
from saert.hub.sources.folder import Folder  # noqa: E402
from saert.hub.sources.repo import Repo  # noqa: E402
from saert.measure.features import FeatureIndex, own_index  # noqa: E402

SAE = "bundled:resid_post.2"
OTHER = "bundled:resid_post.1"
ELSEWHERE = [
    "/etc/passwd", "/etc/pass", "./tests", "../x", "~/x", "~root", "http://127.0.0.1:9/x.pt",
    "http://169.254.169.254/latest/x.bin", "https://huggingface.co/org/repo", "file:///etc/passwd",
    "hf://org/repo", "org/repo/sub/folder", "a\0b",
]  # fmt: skip


@pytest.fixture
def session():
    return open_session(None, [SAE])


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Local folders with the same SAE in each, as if visitors had loaded many."""
    folder = tmp_path_factory.mktemp("saes")
    for name in range(KEPT + 2):
        shutil.copytree(bundled.SAES / "resid_post.1", folder / str(name))
    return [str(folder / str(name)) for name in range(KEPT + 2)]


@contextmanager
def held(monkeypatch, name="load_sae"):
    """Loads that wait until they are let go; how many began."""
    go, began = threading.Event(), []

    def slow(source):
        began.append(source)
        assert go.wait(30)
        return Loaded(source, bundled.sae("resid_post.1"))

    monkeypatch.setattr(workbench_module, name, slow)
    try:
        yield go, began
    finally:
        go.set()


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- which SAEs ------------------------------------------------------------------------------------


def test_nothing_but_the_saes_of_the_start_unless_allowed(session, monkeypatch):
    for name in ("load_sae", "load_public"):
        monkeypatch.setattr(workbench_module, name, None)  # would be called
    bench = Workbench(session)
    assert bench.sae(SAE) is session.saes[0]
    for source in (*ELSEWHERE, OTHER, "org/repo", "gpt2:openai-32k/resid_post.6", ""):
        with pytest.raises(UserError, match=f"^this app has only .* began with: {SAE}$"):
            bench.sae(source)
    with pytest.raises(UserError, match="not by a list"):
        bench.sae([SAE])


def test_from_the_hub_alone_and_in_the_same_words_whatever_is_here(session, monkeypatch):
    monkeypatch.setattr(public, "Repo", None)  # nothing is asked of the Hub either
    bench = Workbench(session, loads="hub")
    for source in ELSEWHERE:
        with pytest.raises(UserError) as caught:
            bench.sae(source)
        assert str(caught.value) == public.REFUSED
    with pytest.raises(ValueError, match="../../x"):
        bench.sae("org/repo:../../x")
    assert bench.sae(OTHER).sae.num_latents == 1024
    with pytest.raises(UserError, match="bundled has"):
        bench.sae("bundled:../../x")
    with pytest.raises(UserError, match=f"{LONGEST + 1} characters"):
        bench.sae("x" * (LONGEST + 1))


class Stored(Folder):
    """A Hub repo, as a folder beside the test."""

    sizes = 4_000

    def __init__(self, name, revision=None):
        assert name in ("org/repo", "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs"), name
        super().__init__(bundled.SAES / "resid_post.1", name)

    def to_fetch(self, name):
        assert name.endswith(".safetensors")
        return self.sizes


def test_a_folder_named_like_a_repo_is_not_read_and_large_repos_are_refused(
    session, monkeypatch, tmp_path
):
    (tmp_path / "org" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(source):
        asked.append(source)
        return Loaded(source, bundled.sae("resid_post.1"))

    monkeypatch.setattr(public, "Repo", Stored)
    monkeypatch.setattr(public, "load_sae", load)
    bench = Workbench(session, loads="hub")
    assert bench.sae("org/repo").source == "org/repo" and asked == ["hf://org/repo"]
    for size, words in (
        (public.MOST_BYTES + 10**8, "is 1.1 GB; at most 1.0 GB"),
        (None, "unknown"),
    ):
        monkeypatch.setattr(Stored, "sizes", size)
        with pytest.raises(UserError, match=words):
            bench.sae("org/repo@main")
    assert len(asked) == 1


def test_what_a_repo_would_have_to_send(monkeypatch):
    repo = Repo("org/repo")
    monkeypatch.setattr(Repo, "_cached", lambda self, name: Path("x") if name == "here" else None)
    repo.__dict__["_declared"] = {"there": type("File", (), {"size": 7})()}
    assert [repo.to_fetch(name) for name in ("here", "there", "unknown")] == [0, 7, None]


def test_folders_on_ones_own_machine_with_labels_of_their_own(session, named, tmp_path):
    bench = Workbench(session, loads="anything")
    labels = Path(named[0], "labels.json")
    labels.write_text('{"3": {"label": "three"}}')
    assert bench.sae(named[0]).label(3) == "three"
    folder, name = os.path.split(named[0])
    assert load_sae(f"{folder}:{name}").label(3) == "three"
    with pytest.raises(UserError, match="no such file or folder"):
        bench.sae(str(tmp_path / "nowhere"))


def test_labels_are_read_from_nowhere_else(monkeypatch, tmp_path, named):
    """An absolute path after the colon would win over what is before it."""
    (tmp_path / "labels.json").write_text('{"3": {"label": "stolen"}}')
    monkeypatch.setattr("saert.hub.session.load", lambda source: bundled.sae("resid_post.1"))
    assert load_sae(f"org/repo:{tmp_path}").label(3) is None


def test_one_sae_has_one_object_however_it_is_spelt(session, named, monkeypatch):
    bench = Workbench(session, loads="anything")
    for spelling in ("bundled", "bundled:", f" {SAE} "):
        assert bench.sae(spelling) is session.saes[0] and bench.sae(spelling).source == SAE
    assert bench.saes(["bundled", SAE, OTHER]) == [session.saes[0], bench.sae(OTHER)]
    monkeypatch.chdir(Path(named[0]).parent)
    assert bench.sae("./0/") is bench.sae(named[0])
    assert canonical("gpt2:openai-32k/resid_post.6") == "gpt2:openai-32k/resid_post.6"


def test_saes_of_the_start_are_on_the_models_device_before_anyone_comes(session, monkeypatch):
    moved = []
    monkeypatch.setattr(type(session.saes[0].sae), "to", lambda self, place: moved.append(place))
    Workbench(session)
    assert moved == [session.model.device]


# -- nobody waits for others -----------------------------------------------------------------------


def test_a_slow_load_keeps_nobody_else_waiting(session, monkeypatch, tmp_path):
    monkeypatch.setattr(workbench_module, "own_index", small(tmp_path))
    bench = Workbench(session, loads="anything")
    bench.wait_index(SAE)
    with ThreadPoolExecutor(AT_ONCE + 3) as pool, held(monkeypatch) as (go, began):
        slow = [pool.submit(bench.sae, "/slow") for _ in range(2)]
        until(lambda: began)

        def others():
            bench.sae(SAE), bench.gathering(SAE), bench.label(SAE, 3), bench.search(SAE, "park")

        pool.submit(others).result(10)
        more = [pool.submit(bench.sae, f"/slow/{i}") for i in range(1, AT_ONCE)]
        until(lambda: len(began) == AT_ONCE)
        with pytest.raises(UserError, match="other SAEs are being loaded"):
            pool.submit(bench.sae, "/slow/more").result(10)
        go.set()
        assert slow[0].result(20) is slow[1].result(20)
        assert len({id(one.result(20)) for one in more}) == AT_ONCE - 1
        assert began.count("/slow") == 1
    bench.close()


def test_a_load_that_failed_is_tried_again(session, monkeypatch):
    calls = []

    def broken(source):
        calls.append(source)
        raise OSError("cut off")

    monkeypatch.setattr(workbench_module, "load_sae", broken)
    bench = Workbench(session, loads="anything")
    for _ in range(AT_ONCE + 1):
        with pytest.raises(OSError, match="cut off"):
            bench.sae("/broken")
    assert len(calls) == AT_ONCE + 1


# -- indices ---------------------------------------------------------------------------------------


def small(cache):
    def made(*args, **options):
        return own_index(*args, **{"rows": 2, "context": 12, "cache": cache} | options)

    return made


def test_indices_of_visitors_saes_go_with_them(session, named, monkeypatch, tmp_path):
    monkeypatch.setattr(workbench_module, "own_index", small(tmp_path))
    bench = Workbench(session, loads="anything")
    kept = bench.wait_index(SAE).place
    assert kept.is_relative_to(tmp_path)
    first = bench.wait_index(named[0])
    assert not first.place.is_relative_to(tmp_path) and first.card(5).latent == 5
    for source in named[1:KEPT]:
        bench.sae(source)
    assert bench.index(named[0]) is first
    bench.sae(named[KEPT])
    assert bench.index(named[0]) is None
    until(lambda: not first.place.exists())
    assert len(bench._loaded) == KEPT and bench.index(SAE) is not None
    assert len([one for one in (tmp_path / "features").iterdir() if one.is_dir()]) == 1
    second = bench.wait_index(named[KEPT]).place
    bench.close()
    assert kept.exists() and not second.exists()


def test_names_and_maxima_start_no_work(session, monkeypatch):
    monkeypatch.setattr(Worker, "begin", None)  # would be called
    bench = Workbench(session)
    assert bench.label(SAE, 0) == "" and bench.label(SAE, 71) == "food"
    assert bench.largest(SAE, 0) is None and bench.index(SAE) is None
    assert [hit.latent for hit in bench.search(SAE, "to the park")] == [546]


def test_maxima_are_read_once(session, monkeypatch, tmp_path):
    monkeypatch.setattr(workbench_module, "own_index", small(tmp_path))
    bench = Workbench(session)
    index, reads = bench.wait_index(SAE), []
    expected = index.largest.tolist()
    monkeypatch.setattr(FeatureIndex, "largest", property(lambda self: reads.append(1)))
    latents = [latent for latent in range(200) if not bench.sae(SAE).label(latent)]
    assert [bench.largest(SAE, n) for n in latents] == [expected[n] for n in latents]
    assert not reads
    bench.close()


def test_the_queue_for_indices_is_bounded_and_served_one_at_a_time(monkeypatch):
    monkeypatch.setattr(gather_module, "WAITING", 2)
    worker, go, running, most = Worker(), threading.Event(), [], []

    def make(told):
        running.append(1)
        most.append(len(running))
        go.wait(20)
        told(0.5, "half")
        running.pop()
        raise ValueError("done")

    first, *rest = [Gathering(str(i), make) for i in range(4)]
    worker.begin(first)
    until(lambda: running)
    worker.begin(rest[0])
    worker.begin(rest[1])
    with pytest.raises(UserError, match="ask again later"):
        worker.begin(rest[2])
    rest[1].drop()  # while it waits
    with pytest.raises(UserError, match="no longer looked at"):
        rest[1].wait()
    go.set()
    with pytest.raises(UserError, match="no examples of 1: done"):
        rest[0].wait()
    worker.close()
    assert most == [1, 1]


def test_closing_ends_the_work_that_is_done(session, monkeypatch):
    begun = threading.Event()

    def endless(*args, told, **options):
        while True:
            begun.set()
            told(0.1, "writing")
            time.sleep(0.01)

    monkeypatch.setattr(workbench_module, "own_index", endless)
    bench = Workbench(session)
    bench.warm()
    assert begun.wait(20)
    started = time.monotonic()
    bench.close()
    assert not bench._worker._thread.is_alive() and time.monotonic() - started < 10


# -- the app ---------------------------------------------------------------------------------------


def test_what_is_uploaded_is_small_and_does_not_stay(session):
    app = build(session).queue(**QUEUE)
    _, url, _ = app.launch(**LAUNCH)
    try:
        large = {"files": ("setup.json", b" " * 2_000_000)}
        reply = httpx.post(f"{url}gradio_api/upload", files=large, timeout=30)
        assert reply.status_code == 413
        fits = {"files": ("setup.json", b"{}")}
        assert httpx.post(f"{url}gradio_api/upload", files=fits, timeout=30).status_code == 200
    finally:
        app.close()
    assert app.delete_cache is not None and app.state_session_capacity <= 1000
    assert app._queue.max_size is not None


@pytest.mark.parametrize("loads", ["nothing", "hub", "anything"])
def test_other_saes_can_be_typed_only_where_they_may_be_loaded(session, loads):
    config = build(session, loads=loads).get_config_file()
    (source,) = (one for one in config["components"] if one["props"].get("elem_id") == "source")
    assert source["props"]["allow_custom_value"] is (loads != "nothing")
    assert ("load" in source["props"]["info"]) is (loads != "nothing")
