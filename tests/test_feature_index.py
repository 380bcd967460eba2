"""The feature index against dense activations, and its files against a run that nothing stopped."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import sae_cases
import torch
from safetensors.numpy import load_file
from tiny_models import GPT2, VOCAB, build, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from saert.activations import JumpReLU
from saert.measure.features import FeatureIndex, Selection, feature_index, store
from saert.measure.features import build as building
from saert.measure.features.cards import Examples
from saert.measure.features.directions import Unembedding, unembedding
from saert.measure.features.files import Damaged, read
from saert.measure.features.vocabulary import vocabulary
from saert.runtime import attach
from saert.sae import SAE

N, D, CONTEXT, AT = 40, 32, 12, "resid_post.1"
OPTIONS = {"splits": 3, "shard_tokens": 5 * CONTEXT, "batch": 2, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


def sae_of(act="topk", transform="none", kind="sae", **options):
    return sae_cases.make(act, transform, kind, d_in=D, n=N, **({"hookpoint": AT} | options))


def text(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, CONTEXT), generator=generator)


@torch.no_grad()
def dense(model, sae, rows):
    """float64 [rows, context, latents], from hidden states that saert did not capture."""
    hidden = model(rows, output_hidden_states=True).hidden_states[2]
    return sae_cases.latents(sae, hidden)


def from_index(index, rows):
    """The same, from the index."""
    found = torch.zeros(len(rows), CONTEXT, len(index), dtype=torch.float64)
    for latent in range(len(index)):
        row, position, values = index.entries(latent)
        order = row * CONTEXT + position
        assert (np.diff(order) > 0).all()  # sorted, and no token twice
        found[row, position, latent] = torch.from_numpy(values).double()
    return found


def near(a, b):
    """Equal up to the rounding of float16, and zero at the same places."""
    torch.testing.assert_close(a, b, rtol=2**-11, atol=1e-7)
    assert torch.equal(a > 0, b > 1e-6)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("act", sae_cases.ACTIVATIONS)
@pytest.mark.parametrize("transform", ["none", "layer_norm"])
def test_an_index_holds_the_dense_activations(act, transform, model, tmp_path):
    sae, rows = sae_of(act, transform), text(11)
    index = feature_index(model, sae, rows, tmp_path, **OPTIONS)
    f = dense(model, sae, rows)
    near(from_index(index, rows), f)
    flat = f.flatten(0, 1)
    torch.testing.assert_close(index.densities, (flat > 1e-6).double().mean(0))
    torch.testing.assert_close(index.largest.double(), flat.amax(0), rtol=1e-3, atol=1e-7)
    assert index.tokens_seen == rows.numel() and torch.equal(index.rows, rows)
    for card in list(index)[::7]:
        a = flat[:, card.latent]
        assert card.density == pytest.approx((a > 0).double().mean().item())
        assert card.mean == pytest.approx(a[a > 0].mean().item() if card.count else 0, rel=1e-3)
        for power, moment in enumerate(card.moments, 1):
            assert moment == pytest.approx((a**power).mean().item(), rel=5e-3, abs=1e-9)
        assert card.heights.sum() == card.count


def test_special_tokens_and_padding_are_nowhere_in_it(model, tmp_path):
    rows = text(7)
    rows[:, 0], rows[3, 8:] = 1, 0  # begin of sequence, padding
    sae = sae_of("relu")
    index = feature_index(model, sae, rows, tmp_path, special=lambda r: r < 3, **OPTIONS)
    used = rows >= 3
    near(from_index(index, rows), dense(model, sae, rows) * used.unsqueeze(-1))
    assert index.tokens_seen == used.sum()
    latent = int(index.counts.argmax())
    card = index.card(latent)
    assert card.density == pytest.approx(card.count / int(used.sum()))
    for one in card.top:
        assert all(token >= 3 for token in one.tokens)


@pytest.mark.parametrize("first", [1, 4, 9])
def test_rows_added_later_make_the_same_files(first, model, tmp_path):
    sae, rows = sae_of("batchtopk", dtype=torch.float32), text(13)
    feature_index(model, sae, rows, tmp_path / "once", **OPTIONS)
    feature_index(model, sae, rows[:first], tmp_path / "twice", **OPTIONS)
    feature_index(model, sae, rows, tmp_path / "twice", **OPTIONS)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_every_row_stands_at_its_own_place_of_a_full_batch(model, tmp_path, monkeypatch):
    sae, rows, seen = sae_of(), text(13), []
    true = building.encoded

    def watched(model, sae, part, **options):
        seen.append(part)
        return true(model, sae, part, **options)

    monkeypatch.setattr(building, "encoded", watched)
    for n in (5, 13):
        feature_index(model, sae, rows[:n], tmp_path, **(OPTIONS | {"batch": 4}))
    places = [[0, 1, 2, 3], [4] * 4, [4, 5, 6, 7], [8, 9, 10, 11], [12] * 4]
    assert torch.equal(torch.stack(seen), rows[torch.tensor(places)])


def stop_at(monkeypatch, name, call):
    """Let a function of the build fail at one of its calls."""
    true, calls = getattr(building, name), []

    def once(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return true(*args, **options)

    monkeypatch.setattr(building, name, once)


@pytest.mark.parametrize(
    "where", [("_entries", 1), ("_entries", 4), ("write_shard", 2), ("merge", 1), ("merge", 3)]
)
def test_a_run_that_was_stopped_goes_on(where, model, tmp_path, monkeypatch):
    sae, rows = sae_of(dtype=torch.float32), text(13)
    feature_index(model, sae, rows, tmp_path / "whole", **OPTIONS)
    feature_index(model, sae, rows[:3], tmp_path / "cut", **OPTIONS)
    with monkeypatch.context() as patched:
        stop_at(patched, *where)
        with pytest.raises(KeyboardInterrupt):
            feature_index(model, sae, rows, tmp_path / "cut", **OPTIONS)
    done = 0
    true = building._entries

    def counted(*args):
        nonlocal done
        done += 1
        return true(*args)

    monkeypatch.setattr(building, "_entries", counted)
    feature_index(model, sae, rows, tmp_path / "cut", **OPTIONS)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    if where[0] == "merge":
        assert done == 0  # nothing was encoded again


@pytest.mark.parametrize("what", ["cut", "empty", "zeros", "other"])
def test_a_torn_shard_is_made_again(what, model, tmp_path, monkeypatch):
    sae, rows = sae_of(dtype=torch.float32), text(13)
    feature_index(model, sae, rows, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patched:
        stop_at(patched, "merge", 1)
        with pytest.raises(KeyboardInterrupt):
            feature_index(model, sae, rows, tmp_path / "cut", **OPTIONS)
    shards = sorted((tmp_path / "cut" / AT / "saert" / "shards").iterdir())
    assert len(shards) == 4
    data = shards[1].read_bytes()
    torn = {"cut": data[:-9], "empty": b"", "zeros": bytes(len(data)), "other": data}[what]
    shards[1].write_bytes(torn)
    if what == "other":  # left by a run over other text, which was never merged
        with pytest.raises(Damaged):
            read(tmp_path / "cut" / AT / "config.json")
        rows = torch.cat([rows[:5], text(8, seed=1)])
        feature_index(model, sae, rows, tmp_path / "new", **OPTIONS)
        feature_index(model, sae, rows, tmp_path / "cut", **OPTIONS)
        assert contents(tmp_path / "new") == contents(tmp_path / "cut")
        return
    feature_index(model, sae, rows, tmp_path / "cut", **OPTIONS)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_torn_file_of_the_index_is_told_and_made_again(model, tmp_path):
    sae, rows = sae_of(dtype=torch.float32), text(13)
    feature_index(model, sae, rows, tmp_path, **OPTIONS)
    before = contents(tmp_path)
    torn = sorted((tmp_path / AT).glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(ValueError, match="run the same feature_index again"):
        FeatureIndex.open(tmp_path)
    feature_index(model, sae, rows, tmp_path, **OPTIONS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("torn", [0, 1])
@pytest.mark.parametrize("stopped", [False, True, "shards"])
def test_a_torn_file_beside_rows_that_end_inside_a_shard(
    torn, stopped, model, tmp_path, monkeypatch
):
    """An intact file holds 7 rows, and shards would be of rows 0 to 3, 4 to 7, and so on."""
    sae, rows = sae_of(dtype=torch.float32), text(13)
    feature_index(model, sae, rows, tmp_path / "once", **OPTIONS)
    folder = tmp_path / "torn"
    feature_index(model, sae, rows[:7], folder, **OPTIONS)
    file = sorted((folder / AT).glob("*.safetensors"))[torn]
    file.write_bytes(file.read_bytes()[:-1])
    if stopped:
        apart = tmp_path / "apart" if stopped == "shards" else folder
        with monkeypatch.context() as patch:
            stop_at(patch, "merge", 1 if stopped == "shards" else 2)
            with pytest.raises(KeyboardInterrupt):
                feature_index(model, sae, rows, apart, **OPTIONS)
        if stopped == "shards":  # of rows 4 to 7, too: it is of no use here
            shutil.copytree(apart / AT / "saert" / "shards", folder / AT / "saert" / "shards")
    index = feature_index(model, sae, rows, folder, **OPTIONS)
    assert torch.equal(index.rows, rows)
    assert contents(folder) == contents(tmp_path / "once")


def test_a_shard_across_the_end_of_a_file_is_refused(model, tmp_path):
    sae, rows = sae_of(), text(4)
    index = feature_index(model, sae, rows[:3], tmp_path, **OPTIONS)
    file = sorted(index.place.glob("*.safetensors"))[0]
    before = file.read_bytes()
    path = store.shard_path(index.place, 2, 4)
    store.write_shard(path, rows[2:].numpy(), np.ones((2, CONTEXT), bool), [], N)
    with pytest.raises(AssertionError, match="rows 2 to 3 do not follow its 3"):
        store.merge(index.place, store.ranges(N, 3)[0], [(2, 4)])
    assert file.read_bytes() == before


def test_a_model_in_training_mode_or_with_saes_attached_is_refused(model, tmp_path):
    sae, rows = sae_of(), text(2)
    with pytest.raises(ValueError, match="training mode"):
        feature_index(tiny("gpt2").train(), sae, rows, tmp_path, **OPTIONS)
    with attach(model, sae), pytest.raises(ValueError, match="attached"):
        feature_index(model, sae, rows, tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_an_offloaded_model_makes_the_same_index_without_a_lens(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    sae, rows = sae_of(dtype=torch.float32), text(4)
    whole = feature_index(model, sae, rows, tmp_path / "whole", **OPTIONS)
    away = accelerate.cpu_offload(tiny("gpt2"), execution_device=torch.device("cpu"))
    found = feature_index(away, sae, rows, tmp_path / "away", **OPTIONS)
    assert torch.equal(found.counts, whole.counts) and torch.equal(found.largest, whole.largest)
    assert "offloaded" in found.config["logit_lens"] and not found.card(0).promoted


def test_labels_without_a_label(model, tmp_path):
    known = {3: {"note": "x"}, 4: {"label": "dogs"}, 5: "cats", 6: None}
    index = feature_index(model, sae_of(), text(2), tmp_path, labels=known, **OPTIONS)
    assert index.labels == {4: "dogs", 5: "cats"} and index.card(3).label is None


def test_a_folder_takes_no_other_model_sae_text_or_settings(model, tmp_path):
    sae, rows = sae_of(), text(5)
    tokenizer = byte_tokenizer()
    feature_index(model, sae, rows, tmp_path, tokenizer=tokenizer, **OPTIONS)
    before = contents(tmp_path)
    other_model = build("GPT2", **(GPT2 | {"n_inner": 44}))
    other_sae = sae_of()
    with torch.no_grad():
        other_sae.W_dec.mul_(1.5)
    other_tokenizer = byte_tokenizer()
    other_tokenizer.add_tokens(["new"])
    asked = {
        "model.fingerprint": dict(model=other_model),
        "sae.fingerprint": dict(sae=other_sae),
        "tokenizer": dict(tokenizer=other_tokenizer),
        "splits: there 3, now 2": dict(splits=2),
        "context: there 12, now 11": dict(rows=rows[:, :-1]),
        "do not begin with them": dict(rows=rows.flip(0)),
        "holds 5 rows": dict(rows=rows[:4]),
        "another `special`": dict(special=lambda r: r == rows[0, 0]),
    }
    given = OPTIONS | dict(model=model, sae=sae, rows=rows, folder=tmp_path, tokenizer=tokenizer)
    for told, change in asked.items():
        with pytest.raises(ValueError, match=told):
            feature_index(**(given | change))
    assert contents(tmp_path) == before
    for bad in (rows[0], rows.float(), rows[:0]):
        with pytest.raises((TypeError, ValueError), match="^rows are .*expected"):
            feature_index(**(given | dict(rows=bad)))
    with pytest.raises(ValueError, match="splits is 0"):
        feature_index(**(given | dict(splits=0)))


def test_the_files_are_delphis(model, tmp_path):
    sae, rows = sae_of(), text(6)
    index = feature_index(model, sae, rows, tmp_path, **OPTIONS)
    config = json.loads((tmp_path / AT / "config.json").read_text())
    assert config["cache_ctx_len"] == config["ctx_len"] == CONTEXT and config["n_splits"] == 3
    paths = sorted((tmp_path / AT).glob("*.safetensors"), key=lambda p: int(p.stem.split("_")[0]))
    assert [path.stem for path in paths] == ["0_12", "13_25", "26_39"]  # delphi's linspace
    total = 0
    for path in paths:
        start = int(path.stem.split("_")[0])
        arrays = load_file(path)  # the library's own reader
        assert arrays["locations"].dtype == np.uint16 and arrays["activations"].dtype == np.float16
        assert np.array_equal(arrays["tokens"], rows.numpy())
        for latent in np.unique(arrays["locations"][:, 2]):
            part = arrays["locations"][:, 2] == latent
            row, position, values = index.entries(start + int(latent))
            assert np.array_equal(arrays["locations"][part, :2], np.stack([row, position], 1))
            assert np.array_equal(arrays["activations"][part], values)
            total += len(row)
    assert total == int(index.counts.sum()) == int((dense(model, sae, rows) > 0).sum())


def test_activations_too_large_for_half_are_kept_whole(model, tmp_path):
    weights = torch.zeros(3, D, dtype=torch.float64)
    weights[0], weights[1, 0] = 0.5, 1e5
    sae = SAE.from_weights(weights, weights, activation=JumpReLU(0.0), hookpoint=AT)
    rows = text(6)
    for n in (2, 6):
        index = feature_index(model, sae, rows[:n], tmp_path, **(OPTIONS | {"splits": 1}))
        near(from_index(index, rows[:n]), dense(model, sae, rows[:n]))
    assert index.largest[1] > 65504 and index._files[0]["activations"].dtype == np.float32
    assert index.dead.tolist() == [2]
    dead = index.card(2)
    assert (dead.count, dead.mean, dead.largest, dead.top, dead.bands) == (0, 0.0, 0.0, (), ())
    json.dumps(dead.as_dict(), allow_nan=False)


def test_examples_are_the_strongest_rows_with_what_is_around_them(model, tmp_path):
    sae, rows = sae_of("relu"), text(30)
    rows[20] = rows[4]  # a text that is there twice is shown once
    index = feature_index(model, sae, rows, tmp_path, **OPTIONS)
    f = dense(model, sae, rows)
    how = Selection(top=6, quantiles=4, per_quantile=3, before=4, after=2, bins=7)
    shown_twice = 0
    for latent in range(0, N, 3):
        a = f[..., latent]
        card = index.card(latent, how)
        best = a.amax(1).double()
        order = best.argsort(descending=True, stable=True).tolist()
        shown_twice += 20 in order[:7] and 4 in order[:7]
        expected = [row for row in order if row != 20 and best[row] > 0][:6]
        assert [one.row for one in card.top] == expected
        everything = [*card.top, *(one for band in card.bands for one in band.examples)]
        for one in everything:
            peak = one.first + one.peak
            assert one.first == max(0, peak - 4)
            last = one.first + len(one.tokens)
            assert last == min(CONTEXT, peak + 3)
            assert list(one.tokens) == rows[one.row, one.first : last].tolist()
            there = a[one.row, one.first : last]
            near(torch.tensor(one.activations, dtype=torch.float64), there)
        for one in card.top:
            assert one.first + one.peak == int(a[one.row].argmax())
        assert sum(band.count for band in card.bands) == card.count
        drawn = [one.row for band in card.bands for one in band.examples]
        assert len(set(drawn)) == len(drawn)
        for band in card.bands:
            assert len(band.examples) == 3 or band.count < 30
            for one in band.examples:
                assert band.low < one.activations[one.peak] <= band.high
        if card.count:
            assert card.bands[0].high == pytest.approx(card.largest) and card.bands[-1].low == 0
        again, other = index.card(latent, how), index.card(latent, Selection(seed=1))
        assert card.bands == again.bands and (card.bands != other.bands or not card.count)
    assert shown_twice  # the case came up


def test_an_activation_at_the_edge_of_two_bands_is_in_the_lower():
    values = np.array([1, 2, 3, 4, 4], np.float32)
    where = np.arange(5), np.zeros(5, np.int64)
    examples = Examples(
        (*where, values), np.zeros((5, 1), np.int64), lambda row: np.ones(1, bool),
        lambda ids: (), Selection(quantiles=4, per_quantile=9),
    )  # fmt: skip
    bands = examples.bands(0)
    assert [(band.low, band.high, band.count) for band in bands] == [
        (3, 4, 2), (2, 3, 1), (1, 2, 1), (0, 1, 1)
    ]  # fmt: skip
    assert [len(band.examples) for band in bands] == [2, 1, 1, 1]


def plain_lens(model, W):
    """Logits of directions by the formula of each architecture."""
    W = W.double()
    kind = model.config.model_type
    head = model.get_output_embeddings().weight.double()
    if kind == "gpt2":
        return (W - W.mean(-1, keepdim=True)) * model.transformer.ln_f.weight.double() @ head.T
    if kind == "gpt_neox":
        norm = model.gpt_neox.final_layer_norm
        return (W - W.mean(-1, keepdim=True)) * norm.weight.double() @ head.T
    if kind == "cohere":
        return (W - W.mean(-1, keepdim=True)) * model.model.norm.weight.double() @ head.T
    plus = 1 if kind.startswith("gemma") else 0
    return W * (model.model.norm.weight.double() + plus) @ head.T


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "cohere", "qwen3"])
def test_the_logit_lens_goes_through_the_models_own_final_norm(name, tmp_path):
    model, sae = tiny(name), sae_of()
    index = feature_index(model, sae, text(2), tmp_path, logits=5, near=4, **OPTIONS)
    lens = plain_lens(model, sae.W_dec)
    W = sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
    cosines = (W @ W.T).fill_diagonal_(-2)
    for card in index:
        best, worst = lens[card.latent].topk(5), lens[card.latent].topk(5, largest=False)
        assert [one.token for one in card.promoted] == best.indices.tolist()
        assert [one.token for one in card.suppressed] == worst.indices.tolist()
        values = torch.tensor([one.value for one in card.promoted + card.suppressed]).double()
        torch.testing.assert_close(
            values, torch.cat([best.values, worst.values]), rtol=1e-3, atol=1e-3
        )
        assert card.logit_heights.sum() == VOCAB
        assert card.logit_span == pytest.approx(
            (worst.values[0].item(), best.values[0].item()), 1e-3
        )
        nearest = cosines[card.latent].topk(4)
        assert [i for i, _ in card.neighbours] == nearest.indices.tolist()
        assert [c for _, c in card.neighbours] == pytest.approx(nearest.values.tolist(), abs=1e-5)


def test_where_the_logit_lens_is_not_defined_it_says_why(model, tmp_path):
    sae = sae_of(kind="sae_plain", hookpoint="mlp_in.1")
    index = feature_index(model, sae, text(2), tmp_path, **OPTIONS)
    assert index.card(0).promoted == () and index.card(0).neighbours
    assert index.config["logit_lens"] == "mlp_in.1 is not in the residual stream"
    narrow = unembedding(tiny("opt_post_norm"), sae_of().hookpoint, D)
    assert "unembedding reads 16" in str(narrow)
    assert isinstance(unembedding(tiny("mamba"), sae_of().hookpoint, D), Unembedding)


@pytest.mark.parametrize("at", [("mlp_in.1", "mlp_out.1"), ("transformer.h.1", None)])
def test_transcoders_paths_and_half_precision_models(at, tmp_path):
    model = tiny("gpt2").to(torch.bfloat16)
    sae = sae_of("jumprelu", kind="sae_plain", hookpoint=at[0], target_hookpoint=at[1])
    index = feature_index(model, sae, text(3), tmp_path, **OPTIONS)
    assert index.counts.sum() > 0 and index.card(1).promoted
    assert str(FeatureIndex.open(tmp_path).hookpoint) == at[0]


def test_search_finds_what_fires_on_a_token(model, tmp_path):
    rows = text(20)
    rows[:, 0] = 1
    sae = sae_of("relu")
    index = feature_index(
        model,
        sae,
        rows,
        tmp_path,
        special=lambda r: r < 3,
        labels={5: {"label": "five"}},
        **OPTIONS,
    )
    f = dense(model, sae, rows) * (rows >= 3).unsqueeze(-1)
    said = rows[2, 3:5].tolist()
    for asked in (said[0], said, rows[2, :2].tolist()):  # the last begins with a special token
        on = torch.zeros_like(rows, dtype=torch.bool)
        want = [asked] if isinstance(asked, int) else asked
        for row in range(len(rows)):
            for start in range(CONTEXT - len(want) + 1):
                if rows[row, start : start + len(want)].tolist() == want:
                    on[row, start : start + len(want)] = True
        on &= rows >= 3
        coverage = (f[on] > 0).double().mean(0)
        share = f[on].sum(0) / f.sum((0, 1)).clamp(min=1e-30)
        score, found = coverage * share, index.search(asked, 8)
        assert [hit.latent for hit in found] == score.argsort(descending=True)[:8].tolist()
        for hit in found:
            assert hit.coverage == pytest.approx(coverage[hit.latent].item())
            assert hit.share == pytest.approx(share[hit.latent].item(), rel=1e-3)
            assert hit.activation == pytest.approx(f[on][:, hit.latent].max().item(), rel=1e-3)
    assert index.search(96 if not (rows == 96).any() else 0) == []
    assert index.search(1) == []  # special: nobody looked there
    with pytest.raises(ValueError, match="expected 1 to 12"):
        index.search([])
    assert index.labels == {5: "five"} and index.card(5).label == "five"


def test_rank_puts_what_is_strong_and_rare_first(model, tmp_path):
    sae, rows = sae_of(), text(20)
    index = feature_index(model, sae, rows, tmp_path, **OPTIONS)
    code = sae.encode(model(rows[:1], output_hidden_states=True).hidden_states[2][0])
    f = dense(model, sae, rows)
    largest = f.amax((0, 1))
    rarity = -((f > 0).double().mean((0, 1)).clamp(min=0.5 / rows.numel())).log()
    score = f[0].amax(0) / largest.clamp(min=1e-30) * rarity
    found = index.rank(code, 6)
    assert [hit.score for hit in found] == pytest.approx(
        score.sort().values.flip(0)[:6].tolist(), 1e-3
    )
    assert all(hit.coverage == pytest.approx((f[0, :, hit.latent] > 0).double().mean().item())
               for hit in found)  # fmt: skip
    with pytest.raises(ValueError, match="40"):
        index.rank(type(code)(code.indices, code.values, N + 1))


def test_opening_says_what_is_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature index"):
        FeatureIndex.open(tmp_path)
    for at in ("resid_post.0", "resid_post.1"):
        feature_index(model, sae_of(hookpoint=at), text(2), tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="resid_post.0, resid_post.1"):
        FeatureIndex.open(tmp_path)
    index = FeatureIndex.open(tmp_path, "blocks.1.hook_resid_post")
    assert str(index.hookpoint) == AT and len(index) == N and "40 latents" in repr(index)
    with pytest.raises(ValueError, match="0 to 39"):
        index.card(N)
    with pytest.raises(FileNotFoundError):
        FeatureIndex.open(tmp_path, "resid_post.2")
    for name in (None, AT, "blocks.1.hook_resid_post"):  # the hookpoint's own folder
        assert FeatureIndex.open(tmp_path / AT, name).place == tmp_path / AT
    with pytest.raises(FileNotFoundError):
        FeatureIndex.open(tmp_path / AT, "resid_post.0")


def test_opening_and_one_card_read_no_whole_file(model, tmp_path):
    index = feature_index(model, sae_of(), text(4), tmp_path, **OPTIONS)
    for arrays in index._files:
        for array in arrays.values():
            while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
                array = array.base
            assert isinstance(array, np.memmap)


def byte_tokenizer():
    """Every byte a token, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_parts_of_a_character_stay_apart():
    strings = vocabulary(byte_tokenizer())
    assert len(set(strings)) == len(strings) == 257
    assert {" ", "\n", "a", "<eos>"} <= set(strings) and not any("�" in one for one in strings)
    assert math.isclose(sum("Ã" in one for one in strings), 1)


def test_a_merge_in_small_pieces_and_of_many_rows(monkeypatch, tmp_path):
    generator = np.random.default_rng(0)
    rows, latents = 2**16 + 3, 5
    tokens = generator.integers(0, 2**17, (rows, 2))
    used = np.ones(tokens.shape, bool)
    # latent 2 is dead, latent 4 fires everywhere
    where = np.sort(generator.choice(rows * 2, 400, replace=False))
    latent = np.concatenate([generator.choice([0, 1, 3], 400), np.full(rows * 2, 4)])
    where = np.concatenate([where, np.arange(rows * 2)])
    order = np.argsort(where, kind="stable")
    where, latent = where[order], latent[order]
    values = generator.random(len(where)).astype(np.float16).astype(np.float32) + 1
    at = store.Range(0, latents)
    for cuts in ([0, rows], [0, 2**16, rows], [0, 3, 2**16 + 1, rows]):
        monkeypatch.setattr(store, "CHUNK", 2**21 if len(cuts) == 2 else 4099)
        place = tmp_path / str(len(cuts))
        for first, last in pairwise(cuts):
            inside = (where >= first * 2) & (where < last * 2)
            entries = [(where[inside] - first * 2, latent[inside], values[inside])]
            path = store.shard_path(place, first, last)
            store.write_shard(path, tokens[first:last], used[first:last], entries, latents)
            store.merge(place, at, [(first, last)])
        got = load_file(place / at.name)
        assert got["locations"].dtype == np.uint32 and got["tokens"].dtype == np.int32
        sort = np.argsort(latent, kind="stable")
        expected = np.stack([where[sort] // 2, where[sort] % 2, latent[sort]], 1)
        assert np.array_equal(got["locations"], expected)
        assert np.array_equal(
            got["activations"].astype(np.float32), values[sort].astype(np.float16)
        )
        assert np.array_equal(got["tokens"], tokens)
        for i in range(latents):
            a = got["activations"][latent[sort] == i].astype(np.float64)
            powers = [(a**power).sum() for power in (1, 2, 3, 4)]
            np.testing.assert_allclose(got["moments"][i], powers, rtol=1e-12)
            assert got["largest"][i] == (a.max() if len(a) else 0)
