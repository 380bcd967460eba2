"""The training text: documents from every kind of source, rows of token ids, and resuming both."""

import gzip
import json
import random
import re
import subprocess
import sys
import threading
from itertools import cycle, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import HubServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saert.train.rows import Prefetched, TokenRows, heldout_rows, special_mask
from saert.train.text import PIECE, DataConfig, DataError, Documents, is_heldout

KINDS = ("txt", "jsonl", "jsonl.gz", "parquet", "ids.parquet", "running.npy", "rows.npy")
BOS_ID, EOS_ID = 256, 257


def byte_tokenizer(bos="<bos>", eos="<eos>"):
    """A token a byte, so that decoding is the inverse of encoding; ids 256 and 257 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys(t for t in (bos, eos) if t)))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """So that small arrays have many."""
    monkeypatch.setattr("saert.train.text.PIECE_IDS", 100)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def encode(tokenizer, text):
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def texts(count, seed=0):
    rng = random.Random(seed)
    return [f"{i}: " + "word " * rng.randrange(1, 60) for i in range(count)]


def write_jsonl(path, documents, field="text"):
    lines = [json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents)]
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Per kind: the configuration of a source of two files."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    found = {}
    for kind in KINDS:
        names = [str(folder / f"{part}.{kind}") for part in "ab"]
        for part, name in enumerate(names):
            documents = texts(90, seed=part)
            if kind == "txt":
                (folder / name).write_text("\n".join(documents))
            elif kind.startswith("jsonl"):
                write_jsonl(folder / name, documents)
            elif kind == "parquet":
                pq.write_table(pa.table({"n": range(90), "text": documents}), name, 40)
            elif kind == "ids.parquet":
                ids = [rng.integers(0, 256, rng.integers(1, 50)).tolist() for _ in range(90)]
                pq.write_table(pa.table({"text": ids}), name, 40)
            else:
                shape = (5000,) if kind == "running.npy" else (90, 24)
                np.save(name, rng.integers(0, 256, shape).astype(np.uint16))
        found[kind] = DataConfig(tuple(names), context=24, holdout=0.1)
    return found


def contents(documents):
    return [d.content if isinstance(d.content, str) else d.content.tolist() for d in documents]


def listed(documents):
    return [(np.asarray(d.content).tolist(), d.continues) for d in documents]


def one_epoch(config, side="train"):
    return contents(Documents(config, side, repeat=False))


def through_json(state):
    return json.loads(json.dumps(state))


# -- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_sides_are_all_documents_in_order(sources, kind):
    config = sources[kind]
    train, heldout = one_epoch(config), one_epoch(config, "heldout")
    assert train and heldout
    whole = one_epoch(DataConfig(config.source, holdout=0.0))
    merged = [d for d in whole if d in train or d in heldout]
    assert merged == whole and len(train) + len(heldout) == len(whole)
    assert not any(d in heldout for d in train)
    if kind in ("jsonl", "jsonl.gz", "parquet"):
        assert whole == texts(90, 0) + texts(90, 1)
    elif kind == "txt":
        assert "".join(whole) == "\n".join(texts(90, 0)) + "\n".join(texts(90, 1))
    elif kind == "running.npy":
        assert sum(whole, []) == np.concatenate([np.load(f) for f in config.source]).tolist()
    elif kind == "rows.npy":
        assert whole == np.concatenate([np.load(f) for f in config.source]).tolist()


def test_the_side_is_a_matter_of_content_alone():
    drawn = {f: {i for i in range(4000) if is_heldout(str(i), f)} for f in (0.0, 0.01, 0.1)}
    assert not drawn[0.0] and drawn[0.01] < drawn[0.1]
    assert 300 < len(drawn[0.1]) < 500
    assert min(drawn[0.01]) == 380  # the same on every machine
    ids = np.arange(900).reshape(-1, 3)
    sides = [[is_heldout(row.astype(t), 0.5) for row in ids] for t in ("<i8", ">i8", "u2")]
    assert sides[0] == sides[1] == sides[2] and set(sides[0]) == {True, False}


def test_text_files_are_pieces_of_whole_lines(tmp_path):
    lines = [f"line {i}\r\n" if i % 3 else "\n" for i in range(2000)]
    (tmp_path / "a.txt").write_text("".join(lines), newline="")
    (tmp_path / "b[1].txt").write_text("no line break")  # nor a pattern
    pieces = list(Documents(DataConfig((str(tmp_path),), holdout=0.0), repeat=False))
    assert "".join(d.content for d in pieces) == "".join(lines).replace("\r", "") + "no line break"
    assert all(d.content.endswith("\n") for d in pieces[:-1])
    assert all(PIECE <= len(d.content) < PIECE + 20 for d in pieces[:-2])
    assert [d.continues for d in pieces] == [False] + [True] * (len(pieces) - 2) + [False]


def test_running_text_continues_only_what_was_given(sources):
    config = sources["running.npy"]
    whole = [d.tolist() for f in config.source for d in np.split(np.load(f), 50)]
    heldout = one_epoch(config, "heldout")
    for document in Documents(config, repeat=False):
        i = whole.index(document.content.tolist())
        assert document.continues == (i % 50 > 0 and whole[i - 1] not in heldout)


def test_epochs_repeat_and_the_limit_counts_both_sides(sources):
    config = DataConfig(sources["jsonl"].source, documents=100, holdout=0.1)
    once = one_epoch(config)
    assert len(once) + len(one_epoch(config, "heldout")) == 100
    documents = Documents(config)
    assert contents(islice(documents, 2 * len(once) + 50)) == (once * 3)[: 2 * len(once) + 50]
    assert documents.epoch == 2
    resumed = Documents(config)
    resumed.load_state_dict(documents.state_dict())
    assert contents(islice(resumed, 60)) == (once * 2)[50:110]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_resume_anywhere(sources, kind):
    """Stop after stop, across epochs, at once after loading, and in a generator already begun."""
    straight = listed(islice(Documents(sources[kind]), 600))
    rng = random.Random(1)
    documents, at = Documents(sources[kind]), 0
    while at < 500:
        count = rng.choice([0, 1, 2, 7, 40, 90, 97])
        assert listed(islice(documents, count)) == straight[at : at + count]
        at += count
        state = through_json(documents.state_dict())
        documents = rng.choice([documents, Documents(sources[kind])])
        list(islice(documents, rng.choice([0, 3])))
        documents.load_state_dict(state)


def test_resume_inside_many_row_groups(tmp_path):
    """More than one batch of what `datasets` reads at a time (1,000 rows)."""
    documents = texts(3500)
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", 1300)
    config = DataConfig((str(tmp_path),), holdout=0.0)
    for at in (999, 1000, 1300, 2601, 3499, 3500):
        first, second = Documents(config), Documents(config)
        list(islice(first, at))
        second.load_state_dict(through_json(first.state_dict()))
        assert contents(islice(second, 2)) == (documents * 2)[at : at + 2]


def test_a_position_belongs_to_its_data(sources, tmp_path):
    state = Documents(sources["jsonl"]).state_dict()
    other = DataConfig((write_jsonl(tmp_path / "c.jsonl", texts(9)),), context=24, holdout=0.2)
    with pytest.raises(DataError, match=r"other data: source was .*a.jsonl.*c.jsonl.*holdout was"):
        Documents(other).load_state_dict(state)


def test_facts_name_the_data_and_not_the_machine(sources):
    facts = Documents(sources["jsonl"]).facts()
    assert [f["name"] for f in facts["files"]] == ["a.jsonl", "b.jsonl"]
    assert all(len(f["sha256"]) == 64 and f["bytes"] > 0 for f in facts["files"])
    assert facts["split"] == "train" and facts["field"] == "text" and facts["datasets"]
    assert "/" not in json.dumps(facts)
    assert Documents(sources["rows.npy"]).facts()["kind"] == "npy"


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "data.txt"},
        {"source": ()},
        {"source": ("a.txt",), "bos": "begin"},
        {"source": ("a.txt",), "context": 1},
        {"source": ("a.txt",), "holdout": 1.0},
        {"source": ("a.txt",), "documents": 0},
        {"source": ("a.txt",), "field": ""},
    ],
)
def test_a_wrong_configuration_says_which_field(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        DataConfig(**wrong)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    np.save("floats.npy", np.ones(4))
    np.save("one.npy", np.ones(4, dtype=int))
    np.save("two.npy", np.ones((4, 4), dtype=int))
    for source, message in {
        ("b.txt",): "no file matches 'b.txt'",
        ("*.json",): "no file matches",
        ("a.csv",): r"cannot read a.csv: expected .txt",
        ("folder",): "no data file in the folder",
        ("empty.jsonl",): "empty.jsonl: an empty file",
        ("a.txt", "a.jsonl"): "mixes kinds of files: 1 text, 1 json",
        (".",): "mixes kinds of files",
        ("a.txt", "someone/text"): "someone/text: no such file, and a Hub dataset must",
        ("floats.npy",): "holds float64",
        ("one.npy", "two.npy"): r"one.npy \(4,\), two.npy \(4, 4\)",
    }.items():
        with pytest.raises(DataError, match=message):
            Documents(DataConfig(source))
    for key in ("name", "revision", "split"):
        with pytest.raises(DataError, match=f"{key} is 'x', but local files have"):
            Documents(DataConfig(("a.txt",), **{key: "x"}))
    with pytest.raises(ConnectionError, match="cannot reach the Hub .*someone/text .offline"):
        Documents(DataConfig(("someone/text",)))  # the tests run with HF_HUB_OFFLINE


def test_fields_that_hold_no_text(tmp_path):
    config = DataConfig((write_jsonl(tmp_path / "a.jsonl", ["text"], "story"),))
    with pytest.raises(DataError, match="no field 'text'; the columns are id, story"):
        next(Documents(config))
    with pytest.raises(DataError, match="field 'id' holds int '0'; expected text or a list"):
        next(Documents(DataConfig(config.source, field="id")))
    config = DataConfig((write_jsonl(tmp_path / "b.jsonl", ["", None, ""]),))
    with pytest.raises(DataError, match="none of the 3 documents read are on the train side"):
        next(Documents(config))


def test_without_datasets_the_error_names_the_extra(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'saert\[train\]'"):
        Documents(sources["jsonl"])
    next(Documents(sources["rows.npy"]))


# -- rows ---------------------------------------------------------------------------------------


def new_rows(config, tokenizer, bos="row", context=24, **more):
    return TokenRows(Documents(config), tokenizer, context, bos, **more)


def written(path, documents):
    return DataConfig((write_jsonl(path, documents),), holdout=0.0)


def test_no_token_is_lost(tmp_path, tokenizer):
    documents = texts(300)
    documents[7] = "long " * 400
    config = written(tmp_path / "a.jsonl", documents)
    bos, eos = "<bos>", "<eos>"
    for mode, expected in {
        "none": eos.join(documents * 2),
        "row": eos.join(documents * 2),
        "document": bos + (eos + bos).join(documents * 2),
    }.items():
        rows = new_rows(config, tokenizer, mode)
        found = torch.cat([rows.take(n) for n in (1, 2, 500, 7, 300)])
        assert found.dtype == torch.int64 and found.shape == (810, 24)
        if mode == "row":
            assert (found[:, 0] == BOS_ID).all()
            found = found[:, 1:]
            assert not (found == BOS_ID).any()
        assert torch.equal(found.flatten(), encode(tokenizer, expected)[: found.numel()])


def test_separators_of_other_tokenizers(tmp_path):
    config = written(tmp_path / "a.jsonl", ["ab", "cd"])
    one = {"bos": "<|end|>", "eos": "<|end|>"}
    for special, mode, expected in (
        (one, "row", "<|end|>ab<|end|>c<|end|>d<|end|>ab"),
        (one, "document", "<|end|>ab<|end|>cd<|end|>a"),
        ({"bos": "<s>", "eos": None}, "document", "<s>ab<s>cd<s>a"),
        ({"bos": "<s>", "eos": None}, "none", "ab<s>cd<s>ab"),
        ({"bos": None, "eos": "</s>"}, "row", "</s>ab</s>c</s>d</s>ab"),
        ({"bos": None, "eos": None}, "none", "abcdabcd"),
    ):
        tokenizer = byte_tokenizer(**special)
        context = 5 if mode == "row" else 4
        found = new_rows(config, tokenizer, mode, context).take(2)
        assert tokenizer.decode(found.flatten()) == expected, (special, mode)
    with pytest.raises(ValueError, match='neither a BOS nor an EOS .* bos="none"'):
        new_rows(config, tokenizer, "row")


def test_running_text_is_not_separated(tmp_path, tokenizer):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig((str(tmp_path),), holdout=0.0)
    found = new_rows(config, tokenizer, "document", 100).take(110).flatten()
    expected = encode(tokenizer, f"<bos>{text}<eos><bos>{text}")
    assert torch.equal(found, expected[: found.numel()])


def test_pretokenised_rows_pass_through(sources, tokenizer):
    config = DataConfig(sources["rows.npy"].source, holdout=0.0)
    whole = torch.from_numpy(np.concatenate([np.load(f) for f in config.source]).astype(np.int64))
    found = new_rows(config, tokenizer, "none", vocab_size=256).take(200)
    assert torch.equal(found, torch.cat([whole, whole[:20]]))
    with_bos = new_rows(config, tokenizer, "row").take(187)
    assert torch.equal(with_bos[:, 1:].flatten()[: whole.numel()], whole.flatten()[: 187 * 23])
    with pytest.raises(DataError, match=r"ids from 0 to 25\d; the vocabulary has 200 ids"):
        new_rows(config, tokenizer, "none", vocab_size=200).take(200)


def test_a_negative_id_is_refused(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.array([3, -1, 4]))
    config = DataConfig((str(tmp_path),), holdout=0.0)
    with pytest.raises(DataError, match="ids from -1 to 4"):
        new_rows(config, tokenizer, "none", 2).take(1)


@pytest.mark.parametrize("kind, bos", list(zip(KINDS, cycle(["row", "document", "none"]))))
def test_rows_resume_anywhere(sources, tokenizer, kind, bos):
    rng = random.Random(f"{kind} {bos}")
    straight = new_rows(sources[kind], tokenizer, bos).take(1500)
    rows, at = new_rows(sources[kind], tokenizer, bos), 0
    while at < 1200:
        count = rng.choice([0, 1, 5, 33, 250])
        assert torch.equal(rows.take(count), straight[at : at + count])
        at += count
        state = through_json(rows.state_dict())
        rows = new_rows(sources[kind], tokenizer, bos)
        rows.load_state_dict(state)


def test_other_rows_refuse_the_position(sources, tokenizer):
    state = new_rows(sources["jsonl"], tokenizer).state_dict()
    with pytest.raises(DataError, match="saved with context=24, bos='row'"):
        new_rows(sources["jsonl"], tokenizer, "none").load_state_dict(state)


def test_special_mask(tokenizer):
    rows = torch.tensor([[BOS_ID, 1, EOS_ID], [0, 255, 2]])
    expected = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(special_mask(rows, tokenizer), expected)


def test_heldout_rows_come_from_one_pass(sources, tokenizer):
    config = sources["jsonl"]
    rows = heldout_rows(config, tokenizer, 10_000)
    expected = encode(tokenizer, "<eos>".join(one_epoch(config, "heldout")))
    assert len(rows) == len(expected) // 23
    assert torch.equal(rows[:, 1:].flatten(), expected[: len(rows) * 23])
    assert torch.equal(heldout_rows(config, tokenizer, 5), rows[:5])
    with pytest.raises(DataError, match="does not fill one row of 24 tokens: raise holdout=1e-09"):
        heldout_rows(DataConfig(config.source, context=24, holdout=1e-9), tokenizer, 5)
    with pytest.raises(ValueError, match="holdout is 0"):
        heldout_rows(DataConfig(config.source, holdout=0.0), tokenizer, 5)


# -- reading ahead ------------------------------------------------------------------------------


class Counting:
    """Rows [n, 1] that count up, up to a failure."""

    def __init__(self, fails_at=None):
        self.at, self.fails_at, self.calls = 0, fails_at, threading.Semaphore(0)

    def take(self, n):
        if self.at == self.fails_at:
            raise OSError("the disk is gone")
        self.at += n
        self.calls.release()
        return torch.arange(self.at - n, self.at)[:, None]

    def state_dict(self):
        return {"at": self.at}


def test_prefetched_rows_are_the_same(sources, tokenizer):
    straight = new_rows(sources["jsonl"], tokenizer)
    ahead = Prefetched(new_rows(sources["jsonl"], tokenizer), 20, depth=3)
    for _ in range(30):
        assert ahead.state_dict() == straight.state_dict()
        assert torch.equal(ahead.take(20), straight.take(20))
    resumed = new_rows(sources["jsonl"], tokenizer)
    state = through_json(ahead.state_dict())
    resumed.load_state_dict(state)
    following = resumed.take(20)
    assert torch.equal(following, ahead.take(20))
    ahead.load_state_dict(state)  # back, though more was read ahead
    assert torch.equal(following, ahead.take(20))
    ahead.close()


def test_prefetching_stays_within_its_depth():
    source = Counting()
    ahead = Prefetched(source, 2, depth=3)
    assert ahead.state_dict() == {"at": 0} and not source.calls.acquire(timeout=0.1)
    ahead.take(2)
    for _ in range(4):
        assert source.calls.acquire(timeout=5)
    assert not source.calls.acquire(timeout=0.1)
    assert ahead.state_dict() == {"at": 2}
    ahead.take(2)
    assert source.calls.acquire(timeout=5) and not source.calls.acquire(timeout=0.1)
    with pytest.raises(ValueError, match=r"take\(3\), but these blocks have 2 rows"):
        ahead.take(3)
    ahead.close()


def test_a_failure_is_raised_in_its_turn():
    ahead = Prefetched(Counting(fails_at=4), 2, depth=5)
    assert ahead.take(2).tolist() == [[0], [1]] and ahead.take(2).tolist() == [[2], [3]]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(2)
    assert ahead.state_dict() == {"at": 4}


def test_the_thread_ends():
    def running():
        return [t for t in threading.enumerate() if "_produce" in t.name]

    ahead = Prefetched(Counting(), 2)
    assert not running()
    ahead.take(2)
    assert len(running()) == 1
    ahead.close()
    assert not running()
    ahead.close()
    with pytest.raises(RuntimeError, match="closed"):
        ahead.take(2)
    ahead = Prefetched(Counting(), 2)
    ahead.take(2)
    del ahead
    assert not running()


# -- the Hub ------------------------------------------------------------------------------------

HUB = """
import json
from itertools import islice
import torch
from saert.train.rows import Prefetched
from saert.train.text import DataConfig, Documents

def opened(**more):
    return Documents(DataConfig(**({"source": ("someone/text",), "holdout": 0.0} | more)))

documents = opened(revision="yesterday")
first = [d.content for d in islice(documents, 30)]
state = json.loads(json.dumps(documents.state_dict()))
documents = opened()  # main, but the position is of yesterday's commit
documents.load_state_dict(state)
second = [d.content for d in islice(documents, 30)]
errors = []
for wrong in ({"revision": "v9"}, {"split": "dev"}, {"name": "x"}, {"source": ("someone/else",)}):
    try:
        opened(**wrong)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps([first, second, documents.epoch, documents.facts(), errors]))

class Rows:
    def take(self, n): return torch.zeros(n, 1)
    def state_dict(self): return {}

ahead = Prefetched(Rows(), 1)  # its thread waits when the interpreter ends
ahead.take(1)
"""


def serve_datasets(hub):
    """The server knows models; a dataset's addresses differ by a prefix."""
    base = hub._http.RequestHandlerClass

    class Handler(base):
        def do_GET(self):
            self.path = re.sub("^/api/datasets/", "/api/models/", self.path)
            self.path = re.sub("^/datasets/", "/", self.path)
            base.do_GET(self)

        do_HEAD = do_GET

    hub._http.RequestHandlerClass = Handler


def test_a_hub_dataset_resumes_at_its_commit_and_the_interpreter_ends(tmp_path):
    old, new = texts(50), texts(50, seed=1)
    revisions = {
        name: {"train.jsonl": "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()}
        for name, documents in (("yesterday", old), ("main", new))
    }
    with HubServer({"someone/text": revisions}) as hub:
        serve_datasets(hub)
        ran = subprocess.run(
            [sys.executable, "-c", HUB],
            env=hub.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    first, second, epoch, facts, errors = json.loads(ran.stdout)
    assert first + second == (old * 2)[:60] and epoch == 1
    assert facts["dataset"] == "someone/text"
    assert facts["revision"] == hub.commit("someone/text", "yesterday")
    expected = ("no revision 'v9'", "Available splits", "'x' not found", "neither a local path nor")
    for error, words in zip(errors, expected, strict=True):
        assert words in error
