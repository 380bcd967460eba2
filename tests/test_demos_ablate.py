"""The Ablate tab without a browser: its data are the library's, its endpoints give the same."""

import pytest
import torch

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from demo_tab import bench as make_bench  # noqa: E402 - after the check for gradio
from demo_tab import served  # noqa: E402

from saert import ablate as ablate_edit  # noqa: E402
from saert import ablation_effects, attribute  # noqa: E402
from saert.demos.ablate import tab as ablate  # noqa: E402
from saert.demos.ablate import view as ablate_view  # noqa: E402
from saert.demos.ablate.data import ablation, effect, token_id  # noqa: E402
from saert.demos.ablate.text import continued, joined, specs  # noqa: E402
from saert.hub.session import UserError  # noqa: E402
from saert.measure.ablation.ranking import logit_changes  # noqa: E402
from saert.measure.attribution.metric import token_logit  # noqa: E402
from saert.measure.steering.stream import Stream  # noqa: E402
from saert.runtime import attach  # noqa: E402

TEXT = "Once upon a time, there was a little girl named Lily. One day, she"
SAE, CODER = "bundled:resid_post.2", "bundled:mlp_in.2"


@pytest.fixture(scope="module")
def bench():
    return make_bench()


@pytest.fixture(scope="module")
def ids(bench):
    return bench.tokenizer(TEXT, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("source", [SAE, CODER])
def test_true_effects_are_the_librarys(bench, ids, source):
    found = ablation(bench, source, TEXT, 13, horizon=4)
    want = ablation_effects(
        bench.model(), bench.sae(source).sae, ids, positions=13, horizon=4, progress=False
    ).sort("kl")
    assert [one["latent"] for one in found["latents"]] == want.latents.tolist()
    for name, key in (("values", "activation"), ("kl", "score"), ("kl", "kl"),
                      ("loss_change", "loss_change"), ("sparsity", "sparsity")):  # fmt: skip
        got = [one[key] for one in found["latents"]]
        assert got == pytest.approx(getattr(want, name).tolist(), rel=1e-3, abs=1e-7)
    assert found["tokens"] == [bench.tokenizer.decode([i]) for i in ids[0]]
    assert found["position"] == 13 and found["active"] == len(want) and found["target"] is None


def test_attribution_is_the_librarys(bench, ids):
    sae, she = bench.sae(SAE).sae, token_id(bench, "she")
    found = ablation(bench, SAE, TEXT, -2, "attributed_logit", token="she")
    at = ids.shape[1] - 2
    want = attribute(bench.model(), sae, ids, token_logit(ids, she, at))["resid_post.2"]
    dense = want.to_dense()[0, at]
    assert found["target"] == " she" and found["position"] == at
    for one in found["latents"]:
        assert one["score"] == pytest.approx(float(dense[one["latent"]]), rel=1e-4, abs=1e-6)
        assert one["kl"] is one["sparsity"] is None
    likeliest = ablation(bench, SAE, TEXT, -2, "attributed_logit")
    bare = bench.model()(ids).logits[0, at]
    assert likeliest["target"] == bench.tokenizer.decode([int(bare.argmax())])


def test_what_a_latent_does_is_the_librarys(bench, ids):
    sae = bench.sae(SAE).sae
    found = effect(bench, SAE, TEXT, 196, 13, 4)
    want = ablation_effects(
        bench.model(), sae, ids, latents=196, positions=13, horizon=4, progress=False
    )
    assert found["kl"] == pytest.approx(float(want.kl[0]), rel=1e-5)
    assert found["kl_by_token"] == pytest.approx(want.kl_by_token[0].tolist(), rel=1e-5)
    assert found["tokens"] == [bench.tokenizer.decode([i]) for i in ids[0, 13:17]]
    names = [bench.tokenizer.decode([i]) for i in want.top_promoted[0, :8]]
    assert [one["token"] for one in found["promoted"]] == names
    changes = -logit_changes(bench.model(), sae, ids, 13, 196, horizon=4).mean(0)
    assert found["promoted"][0]["change"] == pytest.approx(float(changes.max()), rel=1e-5)
    assert found["suppressed"][0]["change"] == pytest.approx(float(changes.min()), rel=1e-5)
    said = ablate_view.sentence(found)
    assert f"{found['sparsity']:.0%} of the 8,192 logits" in said and "4 tokens" in said


def test_the_continuation_is_what_generate_gives(bench):
    both = list(continued(bench, SAE, TEXT, [196, 912], 13, max_new_tokens=8, every=0))
    assert [len(one.ablated) for one in both] == list(range(1, 9))
    model, sae = bench.model(), bench.sae(SAE).sae
    begun = bench.tokenizer("Once upon a time, there was a little girl named Lily.",
                            return_tensors="pt")  # fmt: skip
    length = begun["input_ids"].shape[1]

    def text():
        made = model.generate(**begun, max_new_tokens=8, do_sample=False)
        return bench.tokenizer.decode(made[0, length:])

    assert joined(both[-1].default) == text()
    with attach(model, sae, ablate_edit([196, 912])):
        assert joined(both[-1].ablated) == text()
    assert joined(both[-1].default) != joined(both[-1].ablated)
    assert any(abs(token["heat"]) > 0.1 for token in both[-1].ablated)


def test_what_cannot_be_done_is_said(bench):
    for text in ("", "  \n"):
        with pytest.raises(UserError, match="write at least one word"):
            ablation(bench, SAE, text)
    with pytest.raises(UserError, match="holds 256"):
        ablation(bench, SAE, "the cat " * 300)
    with pytest.raises(ValueError, match="expected one of kl"):
        ablation(bench, SAE, TEXT, by="size")
    with pytest.raises(ValueError, match="outside a text of 18 tokens"):
        ablation(bench, SAE, TEXT, 18)
    with pytest.raises(ValueError, match="nothing comes after the last token"):
        ablation(bench, SAE, TEXT, by="loss_change")
    with pytest.raises(UserError, match="name a single one"):
        ablation(bench, SAE, TEXT, by="attributed_logit", token="xylophone quartet")
    with pytest.raises(ValueError, match="no such latent is active"):
        effect(bench, SAE, TEXT, 3)
    with pytest.raises(UserError, match="no latent is chosen"):
        next(continued(bench, SAE, TEXT, []))
    with pytest.raises(UserError, match="which next token"):
        token_id(bench, " ")
    with pytest.raises(ValueError, match="phase"):
        specs(SAE, [1], "sometimes")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(horizon=2.5), "horizon: found 2.5, expected a whole number"),
        (dict(horizon=0), "horizon is 0"),
        (dict(horizon=True), "horizon: found True"),
        (dict(position=1.5), "position: found 1.5, expected a whole number"),
        (dict(position="1"), "position: found '1'"),
    ],
)
def test_numbers_are_checked_before_anything_runs(bench, monkeypatch, wrong, message):
    monkeypatch.setattr(bench, "model", lambda: pytest.fail("the model ran"))
    with pytest.raises((ValueError, TypeError), match=message):
        ablation(bench, SAE, TEXT, **wrong)
    with pytest.raises((ValueError, TypeError), match=message):
        effect(bench, SAE, TEXT, 196, **wrong)


def test_a_horizon_ends_with_the_text(bench, ids):
    at, far = ids.shape[1] - 3, 300_000_000
    near, whole = (ablation(bench, SAE, TEXT, at, horizon=n) for n in (3, far))
    assert near["latents"] == whole["latents"] and whole["horizon"] == 3
    latent = near["latents"][0]["latent"]
    near, whole = (effect(bench, SAE, TEXT, latent, at, n) for n in (3, far))
    assert {**near, "seconds": 0} == {**whole, "seconds": 0} and len(near["kl_by_token"]) == 3


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        ("12", {}, "latents: found '12', expected a list"),
        (["12"], {}, "latent: found '12'"),
        ([1.0], {}, "latent: found 1.0"),
        ([10**400], {}, "latent: found 10{58}…"),
        ([1024], {}, "latent 1024"),
        ([1], dict(max_new_tokens=8192), "found 8192, expected 1 to 400"),
        ([1], dict(max_new_tokens=2.5), "max_new_tokens: found 2.5"),
        ([1], dict(seed="1"), "seed: found '1'"),
        ([1], dict(position=-1.0), "position: found -1.0"),
    ],
)
def test_what_cannot_be_continued_is_said(bench, latents, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        next(continued(bench, SAE, TEXT, latents, **options))


def test_it_is_the_tokens_that_are_continued(bench, monkeypatch):
    text, seen = "Lily saw a \N{SNOWMAN} in the park", []
    ids = bench.tokenizer(text, return_tensors="pt")["input_ids"]
    cut = next(i for i, one in enumerate(ids[0]) if bench.tokenizer.decode([one]).endswith("�"))
    begun = ids[:, : cut + 1]
    again = bench.tokenizer(bench.tokenizer.decode(begun[0, 1:]))["input_ids"]
    assert again != begun[0].tolist()  # the text of these tokens has other tokens
    draw = Stream.draw
    monkeypatch.setattr(Stream, "draw", lambda *given: seen.append(draw(*given)) or seen[-1])
    list(continued(bench, SAE, text, [196], cut, max_new_tokens=4))
    mask = torch.ones_like(begun)
    made = bench.model().generate(begun, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert seen[::2] == made[0, cut + 1 :].tolist()  # the default text's; the others are ablated


def test_one_token_can_be_looked_at(bench):
    found = ablation(bench, SAE, "Once", 1)
    assert found["latents"][0]["kl"] > 0 and found["latents"][0]["loss_change"] is None
    one = effect(bench, SAE, "Once", found["latents"][0]["latent"], 1)
    assert one["loss_change_by_token"] == [None]
    assert "predict the next token." in ablate_view.sentence(one)
    assert ablate_view.facts(one)[2]["value"] == "–" and ablate_view.by_token(one) == []


def test_the_endpoints_give_the_same(bench):
    with served(ablate, bench) as client:
        found = client.predict(SAE, TEXT, 13, "kl", 4, api_name="/ablation")
        want = ablation(bench, SAE, TEXT, 13, "kl", 4)
        assert found["latents"] == want["latents"] and found["tokens"] == want["tokens"]
        one = client.predict(SAE, TEXT, 196, 13, 4, api_name="/ablation_effect")
        assert one["promoted"] == effect(bench, SAE, TEXT, 196, 13, 4)["promoted"]
        job = client.submit(SAE, TEXT, [196], 13, "all", 6, api_name="/ablated_text")
        last = list(continued(bench, SAE, TEXT, [196], 13, max_new_tokens=6))[-1]
        assert job.result() == {"default": joined(last.default), "ablated": joined(last.ablated)}
        assert 1 <= len(job.outputs()) <= 6  # some are left out where they come fast
        with pytest.raises(Exception, match="write at least one word"):
            client.predict(SAE, " ", api_name="/ablation")
