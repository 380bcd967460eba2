"""Training: the objective, the data, resuming, and what the bundled artefacts promise."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from saert.activations import TopK
from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.format import read
from saert.runtime import attach
from saert.sae import SAE
from saert.train.activations import ActivationStream, capture, hooked
from saert.train.bundled import Corpus, language_model_stage, sae_stage, tokenize
from saert.train.config import (
    BUNDLED_RECIPE,
    DataConfig,
    LanguageModelConfig,
    Recipe,
    SAEConfig,
    build,
    load_recipe,
)
from saert.train.data import (
    CUT_ID,
    END_ID,
    Rows,
    Segment,
    frame,
    pack,
    read_windows,
    segments,
    split_windows,
)
from saert.train.evaluate import Unexplained, cross_entropy, evaluate
from saert.train.language_model import (
    bits_per_character,
    new_model,
    train_language_model,
    train_tokenizer,
    trapezoid,
)
from saert.train.loop import Training, geometric_median, new_sae, train_saes
from saert.train.objectives.topk import aux_loss, fraction_unexplained, topk_loss

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
def model():
    return new_model(LM, LM.vocab_size).eval()


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [
        [END_ID] + [rng.randrange(2, 300) for _ in range(rng.randrange(5, 60))] for _ in range(200)
    ]


def an_sae(num_latents: int = 24, d: int = 8, k: int = 3, seed: int = 0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(num_latents, d, generator=g)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    return SAE.from_weights(
        W_dec.clone(), W_dec, torch.zeros(num_latents), torch.zeros(d), activation=TopK(k)
    ).requires_grad_(True)


# -- the objective ------------------------------------------------------------------------------


def test_loss_is_the_plain_formula():
    sae, x = an_sae(), torch.randn(50, 8)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[1, 5, 7, 9]] = True
    loss = topk_loss(sae, x, x, dead, k_aux=2, coefficient=1 / 32)

    pre = x @ sae.W_enc.T
    kept = pre.topk(3)
    dense = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    e = (x - dense @ sae.W_dec).detach()
    fvu = (x - dense @ sae.W_dec).square().mean() / (x - x.mean(0)).square().mean()
    masked = pre.masked_fill(~dead, -torch.inf).topk(2)
    aux_dense = torch.zeros_like(pre).scatter(1, masked.indices, masked.values.relu())
    aux = (aux_dense @ sae.W_dec - e).square().mean() / (e - e.mean(0)).square().mean()

    torch.testing.assert_close(loss.total, fvu + aux / 32)
    torch.testing.assert_close(loss.fvu, fvu.detach())
    assert loss.fired.tolist() == (dense > 1e-3).any(0).tolist()
    ours = torch.autograd.grad(loss.total, [sae.W_enc, sae.W_dec])
    plain = torch.autograd.grad(fvu + aux / 32, [sae.W_enc, sae.W_dec])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_aux_gradient_reaches_the_encoder_of_dead_latents_only():
    sae, x = an_sae(), torch.randn(50, 8)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[2, 3]] = True
    residual = (x - sae(x)).detach()
    aux_loss(sae, x, residual, dead, k_aux=2).backward()
    moved = sae.W_enc.grad.abs().sum(-1) > 0
    assert moved[dead].all() and not moved[~dead].any()


def test_aux_is_zero_when_no_latent_is_dead():
    sae, x = an_sae(), torch.randn(5, 8)
    none = torch.zeros(24, dtype=torch.bool)
    loss = topk_loss(sae, x, x, none, k_aux=2, coefficient=1 / 32)
    assert loss.aux.item() == 0 and torch.equal(loss.total, loss.fvu)


def test_a_perfect_reconstruction_leaves_a_finite_aux_loss():
    residual = torch.zeros(5, 8)
    dead = torch.ones(24, dtype=torch.bool)
    sae = an_sae()
    sae.b_enc.data.fill_(-100)  # no latent is active
    aux = aux_loss(sae, torch.randn(5, 8), residual, dead, k_aux=2)
    assert aux.isfinite() and aux == 0


def test_a_constant_target_is_no_nan():
    assert fraction_unexplained(torch.ones(4, 3), torch.ones(4, 3)) == 0


# -- the loop -----------------------------------------------------------------------------------


def test_decoder_keeps_unit_norm_and_its_gradient_is_tangent():
    sae = an_sae()
    training = Training(sae, replace(SAE_CONFIG, num_latents=24, k=3))
    for step in range(5):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        before = sae.W_dec.detach().clone()
        training.step(x, x, 1.0)
        along = (sae.W_dec.grad * before).sum(-1)
        assert along.abs().max() < 1e-6
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(24))


def test_a_silent_latent_is_declared_dead_and_revived():
    sae = an_sae()
    with torch.no_grad():
        sae.b_enc[0] = -100
    training = Training(sae, replace(SAE_CONFIG, num_latents=24, k=3, dead_tokens=100))
    training.step(torch.randn(64, 8), torch.randn(64, 8), 0.0)
    assert not training.dead.any()
    x = torch.randn(64, 8)
    training.step(x, x, 0.0)
    assert training.dead[0]
    training.since[0] = 0
    assert not training.dead[0]


def test_stop_and_resume_equals_never_stopped(model, documents, tmp_path):
    pairs = [
        (Hookpoint.parse("resid_post.0"), None),
        (Hookpoint.parse("mlp_in.1"), Hookpoint.parse("mlp_out.1")),
    ]

    def run(checkpoint: Path, stop: int | None = None) -> list[SAE]:
        return train_saes(
            model, documents, pairs, SAE_CONFIG, 32, checkpoint, stop=stop, progress=False
        )

    whole = run(tmp_path / "whole.pt")
    run(tmp_path / "cut.pt", stop=9)  # in the middle of a shuffled buffer
    resumed = run(tmp_path / "cut.pt")
    for a, b in zip(whole, resumed, strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name


def test_language_model_resumes_exactly(documents, tmp_path):
    def run(checkpoint: Path, stop: int | None = None):
        fresh = new_model(LM, LM.vocab_size)
        return train_language_model(fresh, documents, LM, checkpoint, stop=stop, progress=False)

    whole = run(tmp_path / "whole.pt")
    run(tmp_path / "cut.pt", stop=3)
    resumed = run(tmp_path / "cut.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_improves_every_sae(model, documents):
    pairs = [(Hookpoint.parse("resid_post.1"), None)]
    hookpoint = pairs[0][0]
    x = capture(model, pack(documents, 32, 7), [hookpoint])[hookpoint]
    config = replace(SAE_CONFIG, tokens=128 * 60)
    trained = train_saes(model, documents, pairs, config, 32, progress=False)[0]
    start = new_sae(hookpoint, None, x[:512], x[:512], config)
    assert fraction_unexplained(trained(x), x) < 0.8 * fraction_unexplained(start(x), x)


def test_geometric_median_resists_an_outlier_and_meets_a_sample():
    x = torch.cat([torch.zeros(20, 3), torch.full((1, 3), 1e3)])
    assert geometric_median(x).abs().max() < 1e-3


def test_trapezoid():
    rates = [trapezoid(step, 10, 2, 0.4) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


# -- activations and metrics ----------------------------------------------------------------------


def test_capture_reads_what_transformers_returns(model):
    rows = torch.randint(2, 300, (3, 32))
    states = model(rows, output_hidden_states=True).hidden_states
    hookpoint = Hookpoint.parse("resid_post.0")
    found = capture(model, rows, [hookpoint], batch=2)[hookpoint]
    assert torch.equal(found, states[1].flatten(0, 1))


def test_hooks_leave_nothing_behind(model):
    rows = torch.randint(2, 300, (2, 32))
    before = cross_entropy(model, rows)
    with hooked(model, Hookpoint.parse("resid_post.0"), torch.zeros_like):
        assert cross_entropy(model, rows) != before
    assert cross_entropy(model, rows) == before


def test_stream_serves_the_same_tokens_at_every_hookpoint(model, documents):
    sites = [Hookpoint.parse("resid_post.0"), Hookpoint.parse("resid_post.1")]
    rows = Rows(documents, 32, 16, seed=0)
    stream = ActivationStream(model, rows, sites, batch=128, seed=0)
    first, again = stream[1], ActivationStream(model, rows, sites, batch=128, seed=0)[1]
    for site in sites:
        assert torch.equal(first[site], again[site])
    assert not torch.equal(stream[0][sites[0]], first[sites[0]])


def test_streamed_fvu_is_the_direct_one():
    target = torch.randn(1000, 8) * 3 + 5
    reconstruction = target + torch.randn(1000, 8)
    streamed = Unexplained()
    for part in (slice(0, 300), slice(300, 301), slice(301, 1000)):
        streamed.add(target[part], reconstruction[part])
    t, r = target.double(), reconstruction.double()
    direct = (t - r).square().sum() / (t - t.mean(0)).square().sum()
    assert streamed.fvu == pytest.approx(direct.item(), rel=1e-10)


def test_evaluate_of_a_perfect_and_of_a_useless_sae(model):
    rows = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    eye = torch.eye(16)
    perfect = SAE.from_weights(
        torch.cat([eye, -eye]),
        torch.cat([eye, -eye]),
        activation=TopK(32),
        hookpoint="resid_post.0",
    )
    metrics = evaluate(model, perfect, rows, batch=3)
    assert metrics.fvu < 1e-10 and metrics.tokens == 128
    assert metrics.ce_recovered == pytest.approx(1, abs=1e-4)
    silent = SAE.from_weights(
        eye,
        eye,
        -1e6 * torch.ones(16),
        torch.zeros(16),
        activation=TopK(2),
        hookpoint="resid_post.0",
    )
    metrics = evaluate(model, silent, rows)
    assert metrics.dead == 1 and metrics.l0 == 0
    assert metrics.ce_recovered == pytest.approx(0, abs=1e-6)


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


# -- the language model ---------------------------------------------------------------------------


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


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="unknown key 'laerning_rate' in SAEConfig; known: "):
        build(Recipe, {"sae": {"laerning_rate": 1.0}})


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
