"""The Refine tab without a browser: its data are the library's, its endpoint gives the same."""

import pytest

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from demo_tab import bench as make_bench  # noqa: E402 - after the check for gradio
from demo_tab import served  # noqa: E402

from saert import AbsTopK  # noqa: E402
from saert.demos.refine import tab as refine  # noqa: E402
from saert.demos.refine import view as refine_view  # noqa: E402
from saert.demos.refine.data import refinement  # noqa: E402
from saert.hub.session import Loaded, UserError  # noqa: E402
from saert.measure.reports.refined_text import refined_text  # noqa: E402
from saert.measure.reports.refinement import refinement_report  # noqa: E402

TEXT = "Once upon a time, there was a little girl named Lily."
SAE, CODER = "bundled:resid_post.2", "bundled:mlp_in.2"


@pytest.fixture(scope="module")
def bench():
    return make_bench()


def special(rows):
    return rows == 0  # the bundled model's <|endoftext|>, which begins every text


@pytest.mark.parametrize("source", [SAE, CODER])
def test_the_numbers_are_the_librarys(bench, source):
    found = refinement(bench, source, TEXT)
    ids = bench.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model, sae = bench.model(), bench.sae(source).sae
    want = refinement_report(model, sae, ids, special=special, progress=False)
    for got, expected in (
        (found["shrinkage"], want.shrinkage),
        (found["l0"], want.l0),
        (found["l0_refined"], want.l0_refined),
        (found["spliced"]["fvu"], want.fvu),
        (found["respliced"]["fvu"], want.fvu_refined),
        (found["model"]["ce"], want.ce),
        (found["spliced"]["ce"], want.ce_spliced),
        (found["respliced"]["ce"], want.ce_refined),
        (found["spliced"]["kl"], want.kl_spliced),
        (found["respliced"]["kl"], want.kl_refined),
    ):
        assert got == pytest.approx(expected, rel=1e-4)
    text = refined_text(model, sae, ids, special=special)
    assert found["respliced"]["error_by_token"][1:] == pytest.approx(
        text.respliced.error[1:].tolist()
    )
    assert found["respliced"]["error_by_token"][0] is None and found["left_out"][:2] == [
        True,
        False,
    ]
    latents = [(one["latent"], one["before"], one["after"]) for one in found["latents"][4]]
    assert latents == text.latents(4)
    assert [one["token"] for one in found["spliced"]["top"][4]] == [
        bench.tokenizer.decode([i]) for i in text.spliced.top[4]
    ]


def test_what_is_shown_are_those_numbers(bench):
    found = refinement(bench, SAE, TEXT)
    old, new = found["spliced"], found["respliced"]
    assert refine_view.summary(found)[0]["value"] == f"{old['fvu']:.4f} → {new['fvu']:.4f}"
    added = refine_view.column(found, "loss_refined")
    assert added[0] is None and len(added) == len(found["tokens"])
    assert sum(added[1:]) / len(added[1:]) == pytest.approx(new["ce"] - found["model"]["ce"])
    shown, refined = (refine_view.tokens(found, which, 2) for which in ("error", "error_refined"))
    largest = max(x for x in old["error_by_token"] + new["error_by_token"] if x is not None)
    assert shown[3]["heat"] == pytest.approx(old["error_by_token"][3] / largest)
    assert refined[3]["heat"] == pytest.approx(new["error_by_token"][3] / largest)
    assert shown[0]["heat"] is None and shown[2]["selected"] and not shown[3]["selected"]
    assert "special" in refine_view.about(found, 0) and refine_view.latents(found, 0) == []
    first = found["latents"][4][0]
    assert (
        f"{first['before']:.2f} → {first['after']:.2f}" in refine_view.latents(found, 4)[0]["value"]
    )
    silenced = {**found, "latents": [[{**first, "after": 0.0}]]}
    assert "silenced" in refine_view.latents(silenced, 0)[0]["value"]


def test_one_token_is_shown_without_what_it_has_not(bench):
    found = refinement(bench, SAE, "Once")
    assert found["spliced"]["fvu"] is None and found["shrinkage"] is not None
    values = [one["value"] for one in refine_view.summary(found)]
    assert values[0] == "– → –" and "nan" not in " ".join(values)


def test_what_cannot_be_refined_is_said(bench):
    with pytest.raises(UserError, match="write at least one word"):
        refinement(bench, SAE, " ")
    with pytest.raises(UserError, match="holds 256"):
        refinement(bench, SAE, "the cat " * 300)
    one = bench.sae(SAE).sae
    signed = type(one).from_weights(
        one.W_enc, one.W_dec, one.b_enc, one.b_dec, activation=AbsTopK(4), hookpoint=one.hookpoint
    )
    bench._own["signed"] = Loaded("signed", signed)
    with pytest.raises(ValueError, match="AbsTopK gives signed activations"):
        refinement(bench, "signed", TEXT)


def test_the_endpoint_gives_the_same(bench):
    with served(refine, bench) as client:
        found = client.predict(CODER, TEXT, api_name="/refinement")
        want = refinement(bench, CODER, TEXT)
        assert {**found, "seconds": 0} == {**want, "seconds": 0}
        with pytest.raises(Exception, match="write at least one word"):
            client.predict(SAE, "", api_name="/refinement")
