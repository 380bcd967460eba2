"""The bundled model and SAEs: text to artefacts, and what the artefacts that ship promise."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from saert.hub import bundled
from saert.hub.format import read
from saert.measure.reports.evaluate import evaluate
from saert.runtime import attach
from saert.train.bundle.config import (
    BUNDLED_RECIPE,
    DataConfig,
    LanguageModelConfig,
    Recipe,
    SAEConfig,
    load_recipe,
)
from saert.train.bundle.language_model import (
    bits_per_character,
    new_model,
    train_language_model,
    train_tokenizer,
)
from saert.train.bundle.pipeline import Corpus, language_model_stage, sae_stage, tokenize
from saert.train.bundle.windows import (
    CUT_ID,
    END_ID,
    PackedRows,
    Rows,
    Segment,
    frame,
    pack,
    read_windows,
    segments,
    split_windows,
)

VOCABULARY = "the cat dog sat ran on a mat big red hat and saw tree bird then went home to sleep"
WORDS = VOCABULARY.split()
LM = LanguageModelConfig(
    vocab_size=300, context=32, d_model=16, layers=2, heads=2, batch=4, steps=6, warmup=2
)
SAE_CONFIG = SAEConfig(
    hookpoints=("resid_post.0", "resid_post.1"),
    transcoders=(("mlp_in.1", "mlp_out.1"),),
    num_latents=32,
    k=4,
    transcoder_latents=32,
    transcoder_k=4,
    tokens=128 * 20,
    batch_tokens=128,
    buffer_tokens=512,
    k_aux=4,
    dead_tokens=256,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stories(count: int, seed: int = 0) -> str:
    """Our own text: `count` stories of random words."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=20)) + "." for _ in range(count)]
    return "\n<|endoftext|>\n".join(lines)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [
        [END_ID] + [rng.randrange(2, 300) for _ in range(rng.randrange(5, 60))] for _ in range(200)
    ]


# -- data ---------------------------------------------------------------------------------------


def test_packing_keeps_every_token():
    rng = random.Random(1)
    documents = [[rng.randrange(2, 1000) for _ in range(rng.randrange(1, 90))] for _ in range(300)]
    rows = pack(documents, 32, seed=0)
    packed = sorted(t for t in rows.flatten().tolist() if t not in (END_ID, CUT_ID))
    assert packed == sorted(t for document in documents for t in document)
    assert torch.equal(rows, pack(documents, 32, seed=0))
    assert not torch.equal(rows, pack(documents, 32, seed=1))


def test_every_row_starts_with_a_special_token(documents):
    assert set(pack(documents, 32, seed=0)[:, 0].tolist()) <= {END_ID, CUT_ID}


def test_segments_know_where_they_come_from():
    found = segments(["end of a.\n<|endoftext|>\n\nAll of b.\n<|endoftext|>\nStart of c"])
    assert found == [
        Segment("end of a.", starts=False, ends=True),
        Segment("All of b.", starts=True, ends=True),
        Segment("Start of c", starts=True, ends=False),
    ]
    assert frame([7, 8], found[0]) == [CUT_ID, 7, 8, END_ID]
    assert frame([7, 8], found[2]) == [END_ID, 7, 8]


def test_no_training_window_overlaps_a_held_out_one():
    text = stories(40)
    windows = [text[i : i + 200] for i in range(0, len(text) - 200, 100)]
    train, heldout = split_windows(windows, 0.05, shingle=50, seed=0)
    shingles = {w[i : i + 50] for w in heldout for i in range(len(w) - 49)}
    assert heldout and train
    assert not [w for w in train if any(s in w for s in shingles)]


def test_text_files_and_jsonl_are_read_whole(tmp_path):
    text = stories(100)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x", "y")))
    assert "".join(read_windows([tmp_path / "a.txt"])) == text
    assert read_windows([tmp_path / "b.jsonl"]) == ["x", "y"]


def test_batches_cover_an_epoch_once(documents):
    rows = Rows(documents, 32, 4, seed=0)
    seen = torch.cat([rows[step] for step in range(rows.per_epoch)])
    assert len(seen.unique(dim=0)) == len(seen)
    assert torch.equal(Rows(documents, 32, 4, seed=0)[rows.per_epoch + 1], rows[rows.per_epoch + 1])


def test_packed_rows_go_on_where_they_were(documents):
    whole, part = PackedRows(documents, 32, 0), PackedRows(documents, 32, 0)
    expected = whole.take(400)  # more than an epoch
    part.take(150)
    resumed = PackedRows(documents, 32, 0)
    resumed.load_state_dict(part.state_dict())
    assert torch.equal(resumed.take(250), expected[150:])


# -- the language model ---------------------------------------------------------------------------


def test_language_model_resumes_exactly(documents, tmp_path):
    def run(checkpoint: Path, stop: int | None = None):
        fresh = new_model(LM, LM.vocab_size)
        return train_language_model(fresh, documents, LM, checkpoint, stop=stop, progress=False)

    whole = run(tmp_path / "whole.pt")
    run(tmp_path / "cut.pt", stop=3)
    resumed = run(tmp_path / "cut.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tokenizer_round_trip():
    tokenizer = train_tokenizer([stories(50)], 300, 32)
    text = "the cat, ünïcode and  spaces"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer(text).input_ids[0] == END_ID == tokenizer.bos_token_id
    assert tokenizer("<|cut|>", add_special_tokens=False).input_ids == [CUT_ID]


def test_bits_per_character_of_a_uniform_model():
    class Uniform:
        config = GPT2Config(n_positions=3)

        def __call__(self, ids, use_cache):
            return type("Out", (), {"logits": torch.zeros(*ids.shape, 8)})

    def encode(segment):
        return [0], [1 + ord(c) % 7 for c in segment.text]

    found = bits_per_character(
        Uniform(), encode, [Segment("abc", True, True), Segment("de", True, True)]
    )
    assert found.value == pytest.approx(3) and found.characters == 5


# -- recipes and the whole pipeline ---------------------------------------------------------------


def test_the_bundled_recipe_loads():
    recipe = load_recipe(BUNDLED_RECIPE)
    assert recipe.sae.k <= 32 and recipe.language_model.context >= 256
    assert isinstance(recipe.sae.hookpoints, tuple)


def test_from_text_to_a_bundle_that_loads(tmp_path):
    (tmp_path / "text.txt").write_text(stories(400))
    recipe = Recipe(
        data=DataConfig(holdout=0.2, shingle=200),
        language_model=LM,
        sae=replace(SAE_CONFIG, tokens=128 * 4),
    )
    corpus = Corpus.read([tmp_path / "text.txt"], recipe)
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    for _ in range(2):  # the second time, everything is there already
        model, tokenizer = language_model_stage(corpus, recipe, work, out)
        sae_stage(model, tokenizer, corpus, recipe, work, out)
    assert sorted(p.name for p in (out / "saes").iterdir()) == [
        "mlp_in.1",
        "resid_post.0",
        "resid_post.1",
    ]
    assert "bits_per_character" in (out / "model" / "metrics.json").read_text()
    ids = model.generate(**tokenizer("the cat", return_tensors="pt"), max_length=16)
    assert CUT_ID not in ids
    rows = pack(tokenize(tokenizer, corpus.heldout), LM.context, 0)[:-1]
    sae = read(out / "saes" / "mlp_in.1")
    assert str(sae.target_hookpoint) == "mlp_out.1"
    assert evaluate(model, sae, rows).fvu == pytest.approx(sae.metadata["metrics"]["fvu"])


# -- the bundle that ships ------------------------------------------------------------------------

BUNDLED = Path(__file__).parents[1] / "saert" / "bundled"


def test_bundle_is_small_and_keeps_its_promises():
    size = sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file())
    assert size <= 15e6
    metrics = {
        p.parent.name: json.loads(p.read_text()) for p in BUNDLED.glob("saes/*/metrics.json")
    }
    assert set(metrics) == {*(f"resid_post.{i}" for i in range(4)), "mlp_in.2"}
    for name, m in metrics.items():
        assert m["fvu"] <= 0.20 and m["ce_recovered"] >= 0.90 and m["dead"] < 0.10, name
        assert m["l0"] <= 32


def test_bundled_saes_explain_what_the_bundled_model_writes():
    """The cards' figures need the corpus; this one is measured here, on the model's own stories."""
    model, tokenizer = bundled.model(), bundled.tokenizer()
    prompt = tokenizer(["Once upon a time"] * 4, return_tensors="pt")
    torch.manual_seed(0)
    stories = model.generate(**prompt, max_new_tokens=80, min_new_tokens=80, do_sample=True)
    saes = {name: bundled.sae(name) for name in bundled.HOOKPOINTS}
    with attach(model, saes) as attachment, torch.no_grad():
        model(stories)
        report = attachment.report()
    assert {name: one.tokens for name, one in report.items()} == dict.fromkeys(
        saes, stories.numel()
    )
    assert all(one.fvu <= 0.20 and one.l0 <= 32 for one in report.values()), report


def test_nothing_shipped_names_a_machine():
    for path in BUNDLED.rglob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            assert not re.search(r"/(work|tmp|home|root)/", text), path
