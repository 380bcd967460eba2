"""Indices over text that the model writes itself, names from them, and looks at one text."""

import threading

import numpy as np
import pytest
import torch

from saert.hub import bundled
from saert.measure.features import (
    FeatureIndex,
    automatic_name,
    cache_folder,
    direction,
    feature_index,
    look,
    own_index,
    own_rows,
    specials,
)
from saert.measure.features import own as own_module
from saert.measure.passes import encoded
from saert.own_text import own_text

SMALL = {"rows": 4, "context": 24}


@pytest.fixture(scope="module")
def bench():
    return bundled.model(), bundled.tokenizer(), bundled.sae("resid_post.2")


def index_of(tmp_path, bench, stories, **options):
    model, tokenizer, sae = bench
    rows = torch.stack(
        [tokenizer(s * 9, return_tensors="pt")["input_ids"][0, :32] for s in stories]
    )
    return feature_index(
        model, sae, rows, tmp_path, tokenizer=tokenizer, special=specials(tokenizer),
        progress=False, **options,
    )  # fmt: skip


# -- text ------------------------------------------------------------------------------------------


def test_own_text_is_drawn_as_the_model_itself_draws(bench):
    model = bench[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = model.generate(
            torch.zeros(3, 1, dtype=torch.int64), attention_mask=torch.ones(3, 1), do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=11, max_new_tokens=11,
            pad_token_id=0,
        )  # fmt: skip
    torch.testing.assert_close(own_text(model, 0, 3, 12), expected, rtol=0, atol=0)


def test_own_text_neither_uses_nor_moves_the_random_numbers_of_others(bench):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    told = []
    text = own_text(bench[0], 0, 5, 6, batch=2, told=lambda done, of: told.append((done, of)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert told == [(2, 5), (4, 5), (5, 5)] and text.shape == (5, 6)


def test_text_is_written_once_for_a_model_and_again_if_torn(bench, tmp_path, monkeypatch):
    model, tokenizer, sae = bench
    first = own_rows(model, tokenizer, sae, cache=tmp_path, **SMALL)
    assert first.shape == (4, 24) and (first[:, 0] == tokenizer.bos_token_id).all()
    with monkeypatch.context() as patch:
        patch.setattr(own_module, "own_text", None)  # it would be called
        other = bundled.sae("resid_post.1")
        again = own_rows(model, tokenizer, other, cache=tmp_path, **SMALL)
    assert torch.equal(first, again)
    (path,) = (tmp_path / "text").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(own_rows(model, tokenizer, sae, cache=tmp_path, **SMALL), first)


def test_text_is_no_longer_than_the_model_holds(bench, tmp_path, monkeypatch):
    model, tokenizer, sae = bench
    monkeypatch.setattr(model.config, "n_positions", 20)  # GPT-2 spells it so
    rows = own_rows(model, tokenizer, sae, rows=1, context=70, cache=tmp_path)
    assert rows.shape == (1, 20)


def test_a_tokenizer_without_a_start_is_refused(bench, tmp_path):
    class Startless:
        bos_token_id = eos_token_id = None

    with pytest.raises(ValueError, match="no start token"):
        own_rows(bench[0], Startless(), bench[2], cache=tmp_path, **SMALL)


# -- index -----------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_told_of(bench, tmp_path, monkeypatch):
    told = []
    made = own_index(*bench, cache=tmp_path, told=lambda *one: told.append(one), **SMALL)
    text = own_rows(*bench, cache=tmp_path, **SMALL)
    assert torch.equal(made.rows, text) and made.tokens_seen == int((text != 0).sum())
    parts = [part for part, _ in told]
    assert parts == sorted(parts) and parts[-1] == 1.0
    assert "writing" in told[0][1] and any("examples" in what for _, what in told)
    monkeypatch.setattr(own_module, "own_text", None)
    monkeypatch.setattr("saert.measure.features.build.encoded", None)  # nothing is encoded again
    again = own_index(*bench, cache=tmp_path, labels={3: "three"}, **SMALL)
    assert again.place == made.place and torch.equal(again.counts, made.counts)
    assert again.labels == {3: "three"}


def test_an_index_may_go_elsewhere_and_what_hears_of_it_may_end_it(bench, tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "elsewhere"
    made = own_index(*bench, cache=cache, folder=folder, **SMALL)
    assert made.place.is_relative_to(folder) and not (cache / "features").exists()
    kept = own_index(*bench, cache=cache, **SMALL)
    assert kept.place.is_relative_to(cache) and torch.equal(kept.counts, made.counts)

    def told(part, what):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        own_index(*bench, cache=tmp_path / "other", told=told, **SMALL)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_a_torn_index_is_made_again(bench, tmp_path):
    made = own_index(*bench, cache=tmp_path, **SMALL)
    path = sorted(made.place.glob("*.safetensors"))[2]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="damaged"):
        FeatureIndex.open(made.place)
    assert torch.equal(own_index(*bench, cache=tmp_path, **SMALL).counts, made.counts)
    assert path.read_bytes() == whole


def test_saes_and_weights_have_indices_of_their_own(bench, tmp_path):
    model, tokenizer, sae = bench
    place = own_index(*bench, cache=tmp_path, **SMALL).place
    changed = bundled.sae("resid_post.2")
    with torch.no_grad():
        changed.b_enc.add_(0.5)
    assert own_index(model, tokenizer, changed, cache=tmp_path, **SMALL).place != place
    transcoder = own_index(model, tokenizer, bundled.sae("mlp_in.2"), cache=tmp_path, **SMALL)
    assert transcoder.place != place and transcoder.counts.sum() > 0


def test_two_who_ask_at_once_make_one(bench, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return own_text(*args, **options)

    monkeypatch.setattr(own_module, "own_text", counted)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(own_index(*bench, cache=tmp_path, **SMALL)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 2
    assert found[0].place == found[1].place and torch.equal(found[0].counts, found[1].counts)


def test_the_cache_is_where_it_is_asked_to_be(monkeypatch, tmp_path):
    monkeypatch.delenv("SAERT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "saert"
    monkeypatch.setenv("SAERT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("SAERT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "saert"


# -- names -----------------------------------------------------------------------------------------


def test_a_latent_is_named_after_its_strongest_tokens(bench, tmp_path):
    index = index_of(tmp_path, bench, ["Tom and Lily went to the park with a big dog. They ate."])
    words = index.vocabulary
    for latent in range(0, 1024, 37):
        rows, positions, values = index.entries(latent)
        sums: dict[str, float] = {}
        for row, position, value in zip(rows, positions, values, strict=True):
            if value >= values.max() / 2:
                word = words[int(index.rows[row, position])]
                sums[word] = sums.get(word, 0.0) + float(value)
        most = sorted(sums, key=lambda word: -sums[word])[:3]
        named = [f"“{w}”" for w in most if sums[w] >= 0.15 * sum(sums.values())]
        expected = ", ".join(named).replace("\n", "⏎")
        found = automatic_name(index, latent)
        assert sorted(found.split(", ")) == sorted((expected or "various tokens").split(", ")) or (
            not len(values) and found == "never fires"
        )
    assert automatic_name(index, int(index.dead[0])) == "never fires"
    with pytest.raises(ValueError, match="latent 1024"):
        automatic_name(index, 1024)


def test_the_park_latent_names_the_park(bench, tmp_path):
    index = index_of(tmp_path, bench, ["Tom and Lily went to the park with a big dog. They ate."])
    assert automatic_name(index, 546) == "“ park”"  # labelled “to the park” by hand


def test_without_a_tokenizer_there_are_no_names(bench, tmp_path):
    model, tokenizer, sae = bench
    rows = tokenizer("Tom went to the park.", return_tensors="pt")["input_ids"]
    index = feature_index(model, sae, rows, tmp_path, progress=False)
    assert automatic_name(index, int(index.counts.argmax())) == ""


# -- one text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["resid_post.2", "mlp_in.2"])
def test_a_look_is_the_code_of_the_text(bench, place):
    model, tokenizer, _ = bench
    sae = bundled.sae(place)
    ids = tokenizer("Lily saw a big dog in the park", return_tensors="pt")["input_ids"]
    found = look(model, sae, ids[0], specials(tokenizer))
    dense = next(encoded(model, sae, ids)).code.to_dense()[0]
    dense[ids[0] == 0] = 0
    assert torch.equal(found.used, ids[0] != 0)
    torch.testing.assert_close(found.totals, dense.sum(-1))
    assert torch.equal(found.l0, (dense != 0).sum(-1))
    for token in range(len(ids[0])):
        pairs = found.at(token)
        values = [value for _, value in pairs]
        assert values == sorted(values, reverse=True)
        assert {n: v for n, v in pairs} == {
            int(n): float(dense[token, n]) for n in dense[token].nonzero()
        }
    latent = int(dense.sum(0).argmax())
    torch.testing.assert_close(found.of(latent), dense[:, latent])
    with pytest.raises(ValueError, match="latent -1"):
        found.of(-1)


def test_a_direction_is_what_the_card_says(bench, tmp_path):
    index = index_of(tmp_path, bench, ["Tom and Lily went to the park."])
    found, card = direction(*bench, 71), index.card(71)
    assert [one.token for one in found.promoted] == [one.token for one in card.promoted]
    assert [one.string for one in found.suppressed] == [one.string for one in card.suppressed]
    np.testing.assert_allclose(
        [one.value for one in found.promoted], [one.value for one in card.promoted], rtol=1e-5
    )
    assert [n for n, _ in found.neighbours] == [n for n, _ in card.neighbours]
    assert not found.undefined
    with pytest.raises(ValueError, match="latent 1024: the SAE has 0 to 1023"):
        direction(*bench, 1024)
