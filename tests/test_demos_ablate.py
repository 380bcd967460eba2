"""The Ablate tab without a browser: its data are the library's, its endpoints give the same."""

import pytest

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
    both = list(continued(bench, SAE, TEXT, [196, 912], 13, max_new_tokens=8))
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
    with pytest.raises(UserError, match="expected one of kl"):
        ablation(bench, SAE, TEXT, by="size")
    with pytest.raises(UserError, match="of a text of 18 tokens"):
        ablation(bench, SAE, TEXT, 18)
    with pytest.raises(ValueError, match="nothing comes after the last token"):
        ablation(bench, SAE, TEXT, by="loss_change")
    with pytest.raises(UserError, match="name a single one"):
        ablation(bench, SAE, TEXT, by="attributed_logit", token="xylophone quartet")
    with pytest.raises(ValueError, match="no such latent is active"):
        effect(bench, SAE, TEXT, 3)
    with pytest.raises(UserError, match="no latent is chosen"):
        next(continued(bench, SAE, TEXT, []))
    with pytest.raises(ValueError, match="phase"):
        specs(SAE, [1], "sometimes")


def test_one_token_can_be_looked_at(bench):
    found = ablation(bench, SAE, "Once", 1)
    assert found["latents"][0]["kl"] > 0 and found["latents"][0]["loss_change"] is None
    one = effect(bench, SAE, "Once", found["latents"][0]["latent"], 1)
    assert one["loss_change_by_token"] == [None] and "this token's" in ablate_view.sentence(one)
    assert ablate_view.facts(one)[2]["value"] == "–"
    assert "–" in ablate_view.by_token(one)[0]["title"]


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
        assert len(job.outputs()) == 6
        with pytest.raises(Exception, match="write at least one word"):
            client.predict(SAE, " ", api_name="/ablation")
