"""Probing tasks: files read into examples, tokens pooled by hand, suites that resume."""

import csv
import json
import tomllib
from pathlib import Path

import pytest
import sae_cases
import torch
from tiny_models import GPT2, build
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from saert._cli_probe import _folders
from saert.capture import capture
from saert.hub.session import Loaded
from saert.measure import probe_suite, probe_task, read_suite
from saert.measure.probes import suites
from saert.measure.probes.pooling import pooled
from saert.measure.probes.tasks import TaskFile

ROOT = Path(__file__).parents[1]
WORDS = "the dog ran to the park and the cat sat on the red mat with a big ball in the sun"
TEXTS = [
    "the dog ran", "the cat sat on the red mat", "the sun", "a big ball in the park",
    "the dog sat", "the dog and the cat", "the cat ran", "a red dog",
    "the big dog ran to the sun", "a cat in the sun", "the red dog", "the mat",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE whose tokens are parts of words, with a special token before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([WORDS], trainer)
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.fixture(scope="module")
def model():
    return build("GPT2", **(GPT2 | dict(vocab_size=300, n_positions=24)))


def an_sae(act="topk", **options):
    return sae_cases.make(act, d_in=32, n=48, dtype=torch.float32, **options)


def by_hand(model, tokenizer, sae, text, pool, span=None):
    """Dense pooled activations and hidden state of one text, without batches or padding."""
    found = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([found["input_ids"]])
    hidden = capture(model, ids, [sae.hookpoint])[sae.hookpoint]
    start, end = span or (0, 10**9)
    keep = [
        at for at, (begin, stop) in enumerate(found["offset_mapping"])
        if stop > begin and begin < end and stop > start
    ]  # fmt: skip
    f, x = sae_cases.latents(sae, hidden)[keep], hidden[keep].double()
    if pool == "last":
        return f[-1], x[-1], len(keep)
    return (f.amax(0) if pool == "max" else f.mean(0)), x.mean(0), len(keep)


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
@pytest.mark.parametrize(
    ("act", "transform"), [("topk", "none"), ("jumprelu", "layer_norm"), ("gated", "none")]
)
def test_pooling_is_what_one_does_by_hand(model, tokenizer, pool, act, transform):
    sae = an_sae(act, transform=transform)
    found = pooled(model, tokenizer, sae, TEXTS, pool=pool, batch=5)
    dense = found.columns.dense(range(48))
    for at, text in enumerate(TEXTS):
        f, x, count = by_hand(model, tokenizer, sae, text, pool)
        torch.testing.assert_close(dense[at], f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.dense[at].double(), x, rtol=1e-4, atol=1e-5)
        assert found.tokens[at] == count == len(tokenizer(text)["input_ids"]) - 1  # not <s>


def test_words_are_pooled_over_the_tokens_that_overlap_them(model, tokenizer):
    sae, text_of, spans = an_sae(), [], []
    for at, text in enumerate(TEXTS):
        cursor = 0
        for word in text.split():
            start = text.index(word, cursor)
            cursor = start + len(word)
            text_of.append(at)
            spans.append((start, cursor))
    found = pooled(
        model, tokenizer, sae, TEXTS, text_of=torch.tensor(text_of), spans=torch.tensor(spans)
    )
    dense = found.columns.dense(range(48))
    for at, (text, span) in enumerate(zip(text_of, spans, strict=True)):
        f, x, count = by_hand(model, tokenizer, sae, TEXTS[text], "max", span)
        torch.testing.assert_close(dense[at], f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.dense[at].double(), x, rtol=1e-4, atol=1e-5)
        assert found.tokens[at] == count > 0
    assert max(found.tokens) > 1  # or the test says nothing


def test_long_texts_are_cut_and_empty_ones_have_no_token(model, tokenizer):
    texts = ["the dog " * 40, "", "the cat"]
    found = pooled(model, tokenizer, an_sae(), texts)
    assert found.cut == 1 and found.tokens.tolist()[0] == 23 and found.tokens[1] == 0
    assert not found.dense[1].any()
    assert pooled(model, tokenizer, an_sae(), texts, context=5).tokens.tolist()[0] == 4
    with pytest.raises(ValueError, match="context is 99, expected 1 to 24"):
        pooled(model, tokenizer, an_sae(), texts, context=99)
    with pytest.raises(ValueError, match="pool is 'sum'"):
        pooled(model, tokenizer, an_sae(), texts, pool="sum")


def test_a_bfloat16_model_is_read(tokenizer):
    model = build("GPT2", **(GPT2 | dict(vocab_size=300))).to(torch.bfloat16)
    found = pooled(model, tokenizer, an_sae(), TEXTS)
    assert found.dense.dtype == torch.float32 and bool(found.dense.isfinite().all())


# -- files ---------------------------------------------------------------------------------------


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def animals():
    return [{"text": t, "label": int("dog" in t), "side": "ab"[i % 2]} for i, t in enumerate(TEXTS)]


def test_json_lines_and_csv_say_the_same(tmp_path):
    jsonl(tmp_path / "t.jsonl", animals())
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label", "side"], delimiter="\t")
        table.writeheader()
        table.writerows(animals())
    one, other = (TaskFile("t", tmp_path / f"t.{kind}").load() for kind in ("jsonl", "tsv"))
    assert one.texts == other.texts == tuple(TEXTS) and one.labels == other.labels
    assert torch.equal(one.train, other.train) and 8 <= int(one.train.sum()) <= 10


def test_quotes_in_tab_separated_text_are_characters(tmp_path):
    rows = ['he said "no', '"yes', 'it is 5" long', "the end"]
    text = "".join(f"{row}\t{i % 2}\n" for i, row in enumerate(rows))
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + text)
    task = TaskFile("t", tmp_path / "t.tsv").load()
    assert task.texts == tuple(rows) and task.labels == ("0", "1", "0", "1")


@pytest.mark.parametrize(
    ("kind", "row", "says"),
    [
        ("csv", "b, or not,1", r"t.csv, row 2 \(to line 3\): 3 fields, but the header has 2"),
        ("csv", "b", "row 2 .*1 fields, but the header has 2: text, label"),
        ("tsv", "b\t1\t2", "row 2 .*3 fields"),
        ("csv", '"b,1', "row 2 .*unexpected end of data"),
        ("csv", '"b" or not,1', "row 2 .*expected after"),
        ("csv", "b,", "row 2: a label is ''"),
        ("jsonl", '{"text": "b", "label": " "}', "row 2: a label is ' '"),
    ],
)
def test_rows_of_a_table_that_do_not_fit_are_named(tmp_path, kind, row, says):
    head = {"csv": "text,label\na,0", "tsv": "text\tlabel\na\t0", "jsonl": json.dumps(animals()[0])}
    file = tmp_path / f"t.{kind}"
    file.write_text(f"{head[kind]}\n{row}\n" + ("" if row.startswith('"b,') else f"{row}\n"))
    with pytest.raises(ValueError, match=f"task t: .*{says}"):
        TaskFile("t", file).load()


def test_long_texts_and_byte_order_marks_are_read(tmp_path):
    before = csv.field_size_limit()
    long = "word " * 40_000
    (tmp_path / "t.csv").write_text(f"text,label\n{long},0\nb,1\n", encoding="utf-8-sig")
    jsonl(tmp_path / "t.jsonl", [{"text": long, "label": False}, {"text": "b", "label": "true"}])
    marked = "\ufeff" + (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text(marked, encoding="utf-8")
    for kind, labels in (("csv", ("0", "1")), ("jsonl", ("False", "True"))):
        task = TaskFile("t", tmp_path / f"t.{kind}").load()
        assert task.texts == (long, "b") and task.labels == labels
    assert csv.field_size_limit() == before


def test_a_field_past_all_bounds_names_its_row(tmp_path, monkeypatch):
    raise_limit = csv.field_size_limit
    monkeypatch.setattr(csv, "field_size_limit", lambda n=None: raise_limit(*[n and min(n, 50)]))
    (tmp_path / "t.csv").write_text(f"text,label\na,0\n{'x' * 99},1\n")
    before = raise_limit()
    try:
        with pytest.raises(ValueError, match="task t: t.csv, row 2 .*field larger"):
            TaskFile("t", tmp_path / "t.csv").load()
    finally:
        raise_limit(before)


def test_names_of_splits_and_labels_have_one_spelling(tmp_path):
    rows = [
        {"text": t, "label": "1.0" if i % 3 else 0, "test": i % 2 > 0} for i, t in enumerate(TEXTS)
    ]
    file = jsonl(tmp_path / "t.jsonl", [*rows, {"text": "x", "label": 1, "test": ""}])
    options = dict(split="test", train_split=("false",), test_split=("true",))
    task = TaskFile("t", file, labels={"0.0": "no", "1": "yes"}, **options).load()
    assert task.train.tolist() == [True, False] * 6 and set(task.labels) == {"no", "yes"}


def test_splits_and_labels_are_read_by_name(tmp_path):
    file = jsonl(tmp_path / "t.jsonl", [*animals(), {"text": "x", "label": 1, "side": "c"}])
    task = TaskFile(
        "t", file, split="side", train_split=("a",), test_split=("b",),
        labels={"0": "other", "1": "dog"},
    ).load()  # fmt: skip
    assert len(task.texts) == 12 and task.train.tolist() == [True, False] * 6
    assert task.labels == tuple("dog" if "dog" in text else "other" for text in TEXTS)


def test_equal_texts_stay_on_one_side_and_the_seed_decides(tmp_path):
    rows = [{"text": str(i // 2), "label": i // 2 % 2} for i in range(200)]
    file = jsonl(tmp_path / "t.jsonl", rows)
    task = TaskFile("t", file).load()
    assert task.train[::2].tolist() == task.train[1::2].tolist()
    assert int((~task.train).sum()) == 40
    assert torch.equal(task.train, TaskFile("t", file).load().train)
    assert not torch.equal(task.train, TaskFile("t", file, seed=1).load().train)


def test_fewer_examples_are_split_in_the_same_proportion(tmp_path):
    rows = [{"text": str(i), "label": i % 4 == 0} for i in range(1000)]
    file = jsonl(tmp_path / "t.jsonl", rows)
    task = TaskFile("t", file, max_examples=200).load()
    assert len(task.texts) == len(task.labels) == len(task.train) == 200
    assert int((~task.train).sum()) == 40
    held = [label for label, t in zip(task.labels, task.train.tolist(), strict=True) if not t]
    assert abs(held.count("True") - 10) <= 3


def tagged():
    return [
        {"words": t.split(), "tags": ["N" if w in ("dog", "cat") else "O" for w in t.split()]}
        for t in TEXTS
    ]


def test_words_get_their_characters_and_whole_texts_are_drawn(tmp_path):
    file = jsonl(tmp_path / "t.jsonl", tagged())
    task = TaskFile("t", file, words="words", label="tags").load()
    words = [
        task.texts[text][a:b]
        for text, (a, b) in zip(task.text_of.tolist(), task.spans.tolist(), strict=True)
    ]
    assert words == [word for text in TEXTS for word in text.split()]
    assert [w in ("dog", "cat") for w in words] == [label == "N" for label in task.labels]
    for text in range(len(task.texts)):  # the words of a text are on one side
        assert len(set(task.train[task.text_of == text].tolist())) == 1
    few = TaskFile("t", file, words="words", label="tags", max_examples=10).load()
    assert 10 <= len(few.labels) < 20 and len(few.texts) < 6
    assert set(few.text_of.tolist()) == set(range(len(few.texts)))


def test_words_are_looked_up_in_a_text_that_is_given(tmp_path):
    row = {"text": "no dogs!", "words": ["dogs", "!"], "tags": ["N", "O"]}
    file = jsonl(tmp_path / "t.jsonl", [row, row | {"text": "dogs dogs!"}])
    task = TaskFile("t", file, words="words", label="tags").load()
    assert task.texts == ("no dogs!", "dogs dogs!")
    assert task.spans.tolist() == [[3, 7], [7, 8], [0, 4], [9, 10]]


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"txt": "a", "label": 1}], {}, "row 1: no column 'text'; found txt, label"),
        ([{"text": "a", "label": None}], {}, "no column 'label'"),
        ([{"words": ["a"], "label": [1, 2]}], {"words": "words"}, "1 words but 2 labels"),
        ([{"words": "a", "label": [1]}], {"words": "words"}, "should be lists"),
        (
            [{"text": "b", "words": ["a"], "label": [1]}],
            {"words": "words"},
            "the word 'a' is not in the rest",
        ),
        ([{"text": "a", "label": 1}], {"labels": {"0": "no"}}, r"no entry for \['1'\]"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, rows, options, says):
    file = jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(ValueError, match=f"task t: .*{says}"):
        TaskFile("t", file, **options).load()


# -- suites --------------------------------------------------------------------------------------

SUITE = """
name = "small"
context = 20

[[task]]
name = "dogs"
file = "t.jsonl"
labels = { 0 = "other", 1 = "dog" }
test_fraction = 0.3

[[task]]
name = "nouns"
file = "w.jsonl"
words = "words"
label = "tags"
positive = "N"
pool = "last"
"""


@pytest.fixture
def suite(tmp_path):
    jsonl(tmp_path / "t.jsonl", animals())
    jsonl(tmp_path / "w.jsonl", [*tagged(), {"words": ["the"] * 30, "tags": ["O"] * 30}])
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "suite.toml"


def test_a_suite_is_a_table_of_its_tasks(suite, model, tokenizer):
    tasks, sae = read_suite(suite), an_sae()
    found = probe_suite(model, tokenizer, sae, tasks, ks=(2,), dense=True)
    assert [(p.task, p.positive) for p in found] == [("dogs", "other"), ("nouns", "N")]
    assert found[0].skipped == 0 and found[1].skipped == 30 - 19  # past the context, less <s>
    alone = probe_task(model, tokenizer, sae, tasks.tasks[0].load(), ks=(2,), dense=True)
    assert alone[0] == found[0] and alone[0].fits is not None
    assert found[0].dense is not None and set(found[0].k_sparse) == {2}


def test_a_suite_goes_on_where_it_stopped(suite, model, tokenizer, tmp_path, monkeypatch):
    tasks, out = read_suite(suite), tmp_path / "out"
    first = probe_suite(model, tokenizer, an_sae(), tasks, folder=out)
    (out / "nouns.json").unlink()
    read = []
    load = TaskFile.load
    monkeypatch.setattr(TaskFile, "load", lambda self: read.append(self.name) or load(self))
    again = probe_suite(model, tokenizer, an_sae(), tasks, folder=out)
    assert read == ["nouns"] and again == first
    assert probe_suite(model, tokenizer, an_sae(), tasks, folder=out) == first
    assert read == ["nouns"]
    probe_suite(model, tokenizer, an_sae("relu"), tasks, folder=out)  # another SAE
    probe_suite(model, tokenizer, an_sae("relu"), tasks, folder=out, ridge=1e-3)
    assert read == ["nouns"] + ["dogs", "nouns"] * 2
    jsonl(tmp_path / "t.jsonl", animals()[:-1])  # other data
    probe_suite(model, tokenizer, an_sae("relu"), tasks, folder=out, ridge=1e-3)
    assert read[-1] == "dogs" and len(read) == 6


def test_every_setting_of_an_sae_decides_whether_a_result_is_its_own(model):
    """BatchTopK has a buffer without dimensions."""
    options = [{}, {"subtract_b_dec": False}, {"hookpoint": "resid_post.1"}]
    options += [{"transform": "layer_norm"}]
    saes = [an_sae("batchtopk", **each) for each in options]
    by_norm = an_sae("batchtopk")
    by_norm.select_by_decoder_norm = not by_norm.select_by_decoder_norm
    other = build("GPT2", **(GPT2 | dict(vocab_size=300, n_positions=24)))
    with torch.no_grad():
        other.transformer.wte.weight.mul_(2)
    said = [suites._who(model, sae) for sae in [*saes, by_norm]] + [suites._who(other, saes[0])]
    assert len({json.dumps(one) for one in said}) == 6
    assert suites._who(model, an_sae("batchtopk")) == said[0]


def test_what_was_left_out_is_remembered(suite, model, tokenizer, tmp_path):
    rows = [row | {"label": i % 2, "side": "a"} for i, row in enumerate(animals())]
    jsonl(tmp_path / "t.jsonl", [*rows, {"text": "the sun", "label": 2, "side": "b"}])
    text = '[[task]]\nname = "t"\nfile = "t.jsonl"\nsplit = "side"\ntrain_split = "a"\n'
    suite.write_text(text + 'test_split = "b"\n')
    for _ in range(2):
        found = probe_suite(model, tokenizer, an_sae(), read_suite(suite), folder=tmp_path / "out")
        assert [p.positive for p in found] == ["0", "1"] and found.left_out == ("t: 2",)


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"key": 1}', '"key"'])
def test_a_file_that_is_not_a_result_is_named(suite, model, tokenizer, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dogs.json").write_text(text)
    if text == '{"key": 1}':  # of another run: written anew
        probe_suite(model, tokenizer, an_sae(), read_suite(suite), folder=tmp_path / "out")
        return
    with pytest.raises(ValueError, match="dogs.json would get a task's results, but holds"):
        probe_suite(model, tokenizer, an_sae(), read_suite(suite), folder=tmp_path / "out")


def test_saes_at_one_hookpoint_have_a_folder_each(tmp_path):
    def loaded(act, **options):
        return Loaded(act, an_sae(act, **options))

    one, two, three = loaded("topk"), loaded("relu"), loaded("topk", hookpoint="resid_post.1")
    assert _folders(tmp_path, [one]) == [tmp_path]
    assert _folders(tmp_path, [one, three]) == [tmp_path / o.name for o in (one, three)]
    found = _folders(tmp_path, [one, two, three])
    assert len(set(found)) == 3 and found[2] == tmp_path / three.name
    assert all(path.name.startswith(f"{one.name}-") for path in found[:2])
    assert found == _folders(tmp_path, [one, two, three])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[[task]]", "[[tasks]]"), "unknown key 'tasks'; nearest: task"),
        (("t.jsonl", "tt.jsonl"), "task dogs: no file .*nearest: t.jsonl"),
        (('pool = "last"', 'pool = "sum"'), "task nouns: pool is 'sum'"),
        (('pool = "last"', 'pol = "last"'), "unknown key 'pol'; nearest: pool"),
        (("test_fraction = 0.3", 'test_fraction = "x"'), "test_fraction is 'x', expected float"),
        (("test_fraction = 0.3", "test_fraction = 2.0"), "expected between 0 and 1"),
        (('name = "nouns"', 'name = "dogs"'), "several tasks are called dogs"),
        (('name = "nouns"', 'name = "a/b"'), "slash"),
        (('file = "t.jsonl"', 'file = "suite.toml"'), "expected .jsonl"),
        (('label = "tags"', 'label = "tags"\nmax_examples = 1'), "expected at least 4"),
        (("context = 20", "context ="), "is not TOML"),
        (("context = 20", 'context = "x"'), "context is 'x'"),
    ],
)
def test_a_suite_with_a_mistake_says_where(suite, change, says):
    suite.write_text(SUITE.replace(*change))
    with pytest.raises(ValueError, match=says):
        read_suite(suite)


def test_the_example_suite_of_the_docs_is_valid(tmp_path):
    page = ROOT / "docs" / "gao-style-suite.toml"
    for task in tomllib.loads(page.read_text())["task"]:
        (tmp_path / task["file"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / task["file"]).touch()
    assert len(read_suite(page, tmp_path).tasks) > 20


def test_the_public_suite_fits_the_shared_data(shared):
    folder = shared / "data" / "probing"
    suite = read_suite(ROOT / "benchmarks" / "probing.toml", folder)
    tasks = {one.name: one.load() for one in suite.tasks}
    assert {"sentence_polarity", "language", "part_of_speech"} <= set(tasks)
    assert sorted(set(tasks["language"].labels)) == ["de", "en", "es", "fr"]
    speech = tasks["part_of_speech"]
    text, (start, end) = speech.text_of[7], speech.spans[7].tolist()
    assert speech.texts[text][start:end].strip() and len(set(speech.labels)) == 17
    for task in tasks.values():
        assert 0 < int(task.train.sum()) < len(task.labels) == len(task.train)
