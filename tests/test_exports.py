"""Exports against the schemas of their readers, written down here from the readers' source."""

import json
from typing import Annotated

import pytest
import sae_cases
import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from test_feature_index import byte_tokenizer
from tiny_models import GPT2, build

from saert.measure.features import (
    Selection,
    feature_index,
    to_neuronpedia,
    to_openai_viewer,
    to_sae_dashboard,
)

N, TOP = 180, Selection(top=4, quantiles=3, per_quantile=2, before=5, after=3, bins=6)
Part = Annotated[float, Field(ge=0, le=1)]
Lower = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# -- sae-dashboard 0.8, neuronpedia_dashboard.py ---------------------------------------------------


class DashboardActivation(Strict):
    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: list[str]
    values: list[float]
    qualifying_token_index: int


class DashboardFeature(Strict):
    feature_index: int
    neuron_alignment_indices: list[int]
    neuron_alignment_values: list[float]
    neuron_alignment_l1: list[float]
    correlated_neurons_indices: list[int]
    correlated_neurons_l1: list[float]
    correlated_neurons_pearson: list[float]
    correlated_features_indices: list[int]
    correlated_features_l1: list[float]
    correlated_features_pearson: list[float]
    neg_str: list[str]
    neg_values: list[float]
    pos_str: list[str]
    pos_values: list[float]
    frac_nonzero: Part
    freq_hist_data_bar_values: list[float]
    freq_hist_data_bar_heights: list[float]
    logits_hist_data_bar_heights: list[float]
    logits_hist_data_bar_values: list[float]
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    decoder_weights_dist: list[float]
    activations: list[DashboardActivation]
    vector: list[float]


class DashboardBatch(Strict):
    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None
    features: list[DashboardFeature]


# -- neuronpedia 1.2.1, requests/feature_request.py, and ECOSYSTEM's limits ------------------------


class UploadActivation(Strict):
    tokens: Annotated[list[str], Field(min_length=1, max_length=1024)]
    values: list[float]
    quantileMin: float | None
    quantileMax: float | None
    quantileFraction: Part | None

    @model_validator(mode="after")
    def paired(self):
        assert len(self.tokens) == len(self.values)
        return self


class UploadLogit(Strict):
    token: str
    value: float


class UploadExplanation(Strict):
    text: str
    methodName: str | None
    modelName: str | None


class UploadFeature(Strict):
    index: Annotated[int, Field(ge=0)]
    density: Part
    activations: Annotated[list[UploadActivation], Field(min_length=1)]
    explanations: list[UploadExplanation]
    topLogits: Annotated[list[UploadLogit], Field(max_length=20)]
    bottomLogits: Annotated[list[UploadLogit], Field(max_length=20)]


class UploadBatch(Strict):
    modelId: Lower
    source: Annotated[str, StringConstraints(pattern=r"^\d+-[a-z0-9][a-z0-9.-]*$")]
    features: Annotated[list[UploadFeature], Field(min_length=1, max_length=128)]


# -- openai/sparse_autoencoder, sae-viewer/src/types.ts and featureInfo.tsx ------------------------


class AtomSequence(Strict):
    density: float
    doc_id: int
    idx: int
    acts: list[float]
    act: float
    tokens: list[str]
    token_ints: list[int]

    @model_validator(mode="after")
    def at_its_peak(self):
        assert len(self.acts) == len(self.tokens) == len(self.token_ints)
        assert self.acts[self.idx] == self.act > 0
        return self


class Atom(Strict):
    density: Part
    mean_act: float
    mean_act_squared: float
    skew: float
    kurtosis: float
    hist: dict[str, int]
    random: list[AtomSequence]
    top: list[AtomSequence]


# -- the index -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Text in several scripts, split into bytes, with some latents dead."""
    tokenizer = byte_tokenizer()
    model = build("GPT2", **(GPT2 | {"vocab_size": 260}))
    model.name_or_path = "Some_Org/Tiny Model"
    said = 'Zoë said: "naïve"\\ \n\t日本語 🙂 \u2028 </script> end. ' * 6
    ids = tokenizer(said)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 30 * 30]).view(-1, 30)
    sae = sae_cases.make("jumprelu", d_in=32, n=N, hookpoint="resid_post.1")
    with torch.no_grad():
        sae.b_enc[::10] = -1e4
    return feature_index(
        model, sae, rows, tmp_path_factory.mktemp("exports"), tokenizer=tokenizer, batch=4,
        labels={11: "eleven", 10: "dead"}, dataset="own text", progress=False,
    )  # fmt: skip


def loaded(paths, schema):
    """Each file as bytes, as JSON of the standard, and through its schema."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = [json.loads(path.read_bytes(), parse_constant=refuse) for path in paths]
    return [schema.model_validate_json(json.dumps(one)) for one in found]


def alive(index):
    return (index.counts > 0).nonzero().flatten().tolist()


def test_sae_dashboard_batches(index, tmp_path):
    paths = to_sae_dashboard(index, tmp_path, selection=TOP, progress=False)
    batches = loaded(paths, DashboardBatch)
    assert [path.name for path in paths] == ["batch-0.json", "batch-1.json"]
    features = [one for batch in batches for one in batch.features]
    assert [one.feature_index for one in features] == alive(index)
    assert len(batches[0].features) == 128 and len(alive(index)) <= N - 18
    skipped = json.loads((tmp_path / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert skipped == index.dead.tolist() and set(range(0, N, 10)) <= set(skipped)
    head = batches[0]
    assert (head.model_id, head.layer, head.sae_set) == ("tiny-model", 1, f"resid-post-{N}")
    for one in features[::9]:
        card = index.card(one.feature_index, TOP)
        assert one.frac_nonzero == card.density and one.dataset == "own text"
        assert one.pos_str == [logit.string for logit in card.promoted]
        assert sum(one.freq_hist_data_bar_heights) == card.count
        assert sum(one.logits_hist_data_bar_heights) == 260
        assert one.freq_hist_data_bar_values[-1] < card.largest
        parts = {a.bin_min: a.bin_contains for a in one.activations if a.bin_min >= 0}
        if len(parts) == 3:  # every token is in a band, silent ones in the lowest
            assert sum(parts.values()) == pytest.approx(1)
        for a in one.activations:
            assert a.bin_min < a.values[a.qualifying_token_index] <= a.bin_max * (1 + 1e-6)


def test_neuronpedia_uploads(index, tmp_path):
    batches = loaded(to_neuronpedia(index, tmp_path, selection=TOP, progress=False), UploadBatch)
    features = [one for batch in batches for one in batch.features]
    assert [one.index for one in features] == alive(index)
    assert (batches[0].modelId, batches[0].source) == ("tiny-model", f"1-resid-post-{N}")
    said = {one.index: one.explanations[0].text for one in features if one.explanations}
    assert said == {11: "eleven"}
    for one in features:
        bands = {
            a.quantileMin: a.quantileFraction for a in one.activations if a.quantileMin is not None
        }
        assert sum(bands.values()) <= 1 + 1e-9
    named = to_neuronpedia(
        index, tmp_path / "named", model_id="GPT2-Small", source_set="My Set", layer=7,
        latents=[11], selection=TOP, progress=False,
    )  # fmt: skip
    (batch,) = loaded(named, UploadBatch)
    assert (batch.modelId, batch.source) == ("gpt2-small", "7-my-set")
    with pytest.raises(ValueError, match="1024"):
        to_neuronpedia(index, tmp_path, selection=Selection(before=1000, after=24), progress=False)
    with pytest.raises(ValueError, match="top is 0"):
        to_neuronpedia(index, tmp_path, selection=Selection(top=0), progress=False)


def test_openai_viewer_atoms(index, tmp_path):
    paths = to_openai_viewer(index, tmp_path, selection=TOP, progress=False)
    assert [path.name for path in paths] == [f"{latent}.json" for latent in range(N)]
    assert {path.parent.name for path in paths} == {"atoms"}
    for latent, atom in enumerate(loaded(paths, Atom)):
        values = index.entries(latent)[2].astype("float64")
        assert sum(atom.hist.values()) == len(values) == index.counts[latent]
        for key, count in atom.hist.items():  # bin k holds ((k - 1)·0.2, k·0.2]
            assert count == ((values > (int(key) - 1) * 0.2) & (values <= int(key) * 0.2)).sum()
        assert atom.mean_act == pytest.approx(values.sum() / index.tokens_seen)
        if len(values):
            second = (values**2).sum() / index.tokens_seen
            assert atom.mean_act_squared == pytest.approx(second)
            assert atom.kurtosis == pytest.approx((values**4).sum() / index.tokens_seen / second**2)


def test_search_by_a_tokens_spelling(index):
    letter = index.vocabulary.index("e")
    assert index.search("e") == index.search(letter) == index.search([letter]) != []
    with pytest.raises(ValueError, match="no token is spelt 'end'"):
        index.search("end")


def test_every_token_comes_back_as_it_was(index, tmp_path):
    (path,) = to_openai_viewer(index, tmp_path, latents=[alive(index)[0]], progress=False)
    (atom,) = loaded([path], Atom)
    for one in atom.top:
        assert one.tokens == [index.vocabulary[i] for i in one.token_ints]
        assert "�" not in "".join(one.tokens)


def test_without_a_tokenizer_there_is_nothing_to_show(tmp_path):
    model, sae = build("GPT2", **GPT2), sae_cases.make(d_in=32)
    rows = torch.arange(24).view(2, 12)
    index = feature_index(model, sae, rows, tmp_path, progress=False)
    for export in (to_sae_dashboard, to_neuronpedia, to_openai_viewer):
        with pytest.raises(ValueError, match="tokenizer="):
            export(index, tmp_path / "out", progress=False)
    assert index.card(0).top == () or index.card(0).top[0].strings == ()
