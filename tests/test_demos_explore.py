"""What stands behind the Explore tab: indices in the background, looks, cards, its interface."""

import threading
import time

import pytest
import torch

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from saert.demos import gather  # noqa: E402
from saert.demos import workbench as workbench_module  # noqa: E402
from saert.demos.explore import card as cards  # noqa: E402
from saert.demos.explore import looking  # noqa: E402
from saert.demos.workbench import Workbench  # noqa: E402
from saert.hub import bundled  # noqa: E402
from saert.hub.session import UserError, open_session  # noqa: E402
from saert.measure.features import feature_index, own_index, specials  # noqa: E402

SAE, TRANSCODER, OTHER = "bundled:resid_post.2", "bundled:mlp_in.2", "bundled:resid_post.1"
TEXT = "Tom and his dog went to the park. <b>Fun</b> & games"


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """An index of two SAEs over stories about a park, as `saert index` leaves one."""
    folder = tmp_path_factory.mktemp("features")
    tokenizer = bundled.tokenizer()
    story = "Tom and Lily went to the park with a big dog. They ate an apple pie. " * 9
    rows = tokenizer(story, return_tensors="pt")["input_ids"][:, :96].repeat(3, 1)
    rows[1] = torch.cat([rows[1, :1], rows[1, 20:], rows[1, 1:20]])
    rows[2] = torch.cat([rows[2, :1], rows[2, 40:], rows[2, 1:40]])
    for place in ("resid_post.2", "mlp_in.2"):
        feature_index(
            bundled.model(), bundled.sae(place), rows, folder, tokenizer=tokenizer,
            special=specials(tokenizer), progress=False,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bench(features):
    bench = Workbench(open_session(None, [SAE, TRANSCODER]), features)
    for source in (SAE, TRANSCODER):
        bench.wait_index(source)
    until = time.monotonic() + 20
    while len(bench.gathering(SAE).names) < 1024 and time.monotonic() < until:
        time.sleep(0.05)
    return bench


# -- the index in the background -------------------------------------------------------------------


def test_the_folder_of_the_start_is_used_for_the_saes_it_covers(bench, features, monkeypatch):
    assert bench.index(SAE).place == features / "resid_post.2"
    assert bench.index(TRANSCODER).place == features / "mlp_in.2"
    changed = bench.sae(SAE)
    assert gather.covering(features, changed) is not None
    other = bundled.sae("resid_post.2")
    with torch.no_grad():
        other.W_dec.mul_(1.5)
    monkeypatch.setattr(bundled, "sae", lambda place: other)
    assert gather.covering(features, type(changed)(SAE, other)) is None
    assert gather.covering(features / "nowhere", changed) is None


def test_without_a_folder_the_model_writes_text_and_nobody_waits(monkeypatch, tmp_path):
    go, told = threading.Event(), []

    def slow(model, tokenizer, sae, *, labels, told):
        told(0.25, "writing")
        go.wait(20)
        return own_index(model, tokenizer, sae, labels=labels, rows=2, context=16, cache=tmp_path)

    monkeypatch.setattr(workbench_module, "own_index", slow)
    bench = Workbench(open_session(None, [SAE]))
    bench.warm()
    assert bench.index(SAE) is None  # at once
    assert bench.label(SAE, 71) == "food" and bench.label(SAE, 0) == ""
    assert bench.largest(SAE, 71) == 10.77 and bench.largest(SAE, 0) is None
    assert [hit.latent for hit in bench.search(SAE, "to the park")] == [546]  # labels need none

    def progress(part, what):
        told.append((part, what))
        go.set()

    index = bench.wait_index(SAE, progress)
    assert index.tokens_seen == 30 and told[0] == (0.25, "writing")
    assert bench.index(SAE) is index
    latent = next(n for n in range(1024) if index.counts[n] and not bench.sae(SAE).label(n))
    assert bench.label(SAE, latent) and bench.largest(SAE, latent) == float(index.largest[latent])


def test_a_failure_is_told_and_tried_again_only_when_asked(monkeypatch, tmp_path):
    calls = []

    def broken(*args, **options):
        calls.append(1)
        raise OSError("no space left")

    monkeypatch.setattr(workbench_module, "own_index", broken)
    bench = Workbench(open_session(None, [SAE]))
    with pytest.raises(UserError, match=f"no examples of {SAE}: no space left"):
        bench.wait_index(SAE)
    for latent in range(3):
        bench.label(SAE, latent)
    assert bench.index(SAE) is None and len(calls) == 1
    with pytest.raises(UserError):
        bench.wait_index(SAE)
    assert len(calls) == 2


def test_search_gives_labels_then_names_then_places(bench):
    found = bench.search(SAE, "park")
    whys = [hit.why for hit in found]
    assert found[0].latent == 546 and whys[0] == "label"
    order = [0 if w == "label" else 1 if w == "strongest tokens" else 2 for w in whys]
    assert order == sorted(order) and {1, 2} <= set(order)
    assert len({hit.latent for hit in found}) == len(found)
    assert bench.search(SAE, "zxqj") == []
    with pytest.raises(UserError, match="write what to look for"):
        bench.search(SAE, "  ")


# -- a text ----------------------------------------------------------------------------------------


def test_a_text_with_its_latents(bench):
    one = looking.looked(bench, TEXT, SAE)
    shades = looking.heat(bench, one, token=3)
    assert "".join(shade["text"] for shade in shades[1:]) == TEXT
    assert shades[0]["heat"] is None and shades[3]["selected"] and not shades[2]["selected"]
    heats = [shade["heat"] for shade in shades[1:]]
    assert min(heats) == 0 and max(heats) == 1
    park = next(i for i, shade in enumerate(shades) if shade["text"] == " park")
    listed = looking.at_token(bench, one, park)
    assert [bar["share"] for bar in listed] == sorted((b["share"] for b in listed), reverse=True)
    bar = next(bar for bar in listed if bar["name"] == "#546")
    value = one.look.of(546)[park]
    part = float(value) / bench.largest(SAE, 546)
    assert bar["label"] == "to the park" and bar["value"] == f"{value:.2f} · {part:.0%} of max"
    coloured = looking.heat(bench, one, 546)
    assert coloured[park]["heat"] == pytest.approx(part)
    everywhere = looking.firing(bench, one, bench.index(SAE))
    assert everywhere[0]["share"] == 1 and len(everywhere) == 20


@pytest.mark.parametrize(
    ("text", "source", "said"),
    [
        (" ", SAE, "write at least one word"),
        ("dog " * 300, SAE, "holds 256"),
        ("dog", "./nowhere", "only the SAEs it began with"),
    ],
)
def test_what_cannot_be_looked_at_is_said(bench, text, source, said):
    with pytest.raises(UserError, match=said):
        looking.looked(bench, text, source)


# -- cards -----------------------------------------------------------------------------------------


def test_a_card_in_parts(bench):
    card = cards.known(bench, SAE, 546)
    assert cards.title(bench, SAE, 546) == "<h3>#546 to the park</h3>"
    unnamed = next(n for n in range(1024) if not bench.sae(SAE).label(n) and card.count)
    assert "named after" in cards.title(bench, SAE, unnamed)
    assert [one["name"] for one in cards.figures(card)] == ["density", "mean", "maximum"]
    assert "<svg" in cards.activations(card)
    page = cards.examples(card)
    shown = sum(1 for band in card.bands if band.examples)  # the first is open, empty ones left out
    assert page.count("<details") == shown > 0 and page.count("<details open>") == 1
    assert "park" in page
    points = cards.written(bench, SAE, 546)
    assert cards.lens(points).count("<li") == 20
    near = cards.near(bench, SAE, points)
    assert [int(bar["name"][1:]) for bar in near] == [n for n, _ in card.neighbours]


def test_a_dead_latent_is_called_dead(bench):
    dead = int(bench.index(SAE).dead[0])
    card = cards.known(bench, SAE, dead)
    assert "dead" in cards.activations(card) and cards.examples(card) == ""
    assert "nothing to explain" in cards.explanation(bench, SAE, dead, bench.index(SAE).rows)


@pytest.mark.parametrize("source", [SAE, TRANSCODER])
def test_the_effect_of_ablating_here(bench, source):
    one = looking.looked(bench, TEXT, source)
    latent = one.look.at(8)[0][0]
    page = cards.effect(bench, one, latent)
    assert f"Taken away at “{one.strings[int(one.look.of(latent).argmax())]}”" in page
    assert "promotes <code>" in page
    assert f"Taken away at “{one.strings[8]}”" in cards.effect(bench, one, latent, 8)
    silent = next(n for n in range(one.look.code.num_latents) if not one.look.of(n).any())
    assert "does not fire in this text" in cards.effect(bench, one, silent)
    assert cards.effect(bench, None, latent) == ""
    assert not bench.session.model._forward_hooks and cards.lens(
        cards.written(bench, source, latent)
    ).count("<li")


def test_what_is_not_defined_is_said(bench):
    points = cards.Direction((), (), "mlp_act.2 is <not> in the residual stream", ())
    assert "not defined: mlp_act.2 is &lt;not&gt; in" in cards.lens(points)


def test_an_explanation_has_patterns_and_figures(bench):
    page = cards.explanation(bench, SAE, 546, bench.index(SAE).rows)
    assert "<li><code>" in page and "% of its activations" in page


def test_steering_with_a_latent_adds_its_maximum(bench):
    spec = cards.steer_with(bench, SAE, 546)
    assert (spec["sae"], spec["latent"], spec["op"]) == (SAE, 546, "add")
    assert spec["amount"] == float(f"{bench.largest(SAE, 546):.3g}")


def test_a_latent_by_number(bench):
    assert cards.number(" #71 ", 1024) == 71 and cards.number("park 7", 1024) is None
    with pytest.raises(UserError, match="latent 1024: this SAE has 0 to 1023"):
        cards.number("1024", 1024)


# -- programs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(features):
    gradio_client = pytest.importorskip("gradio_client")
    from saert.demos.app import build

    app = build(open_session(None, [SAE, TRANSCODER]), features)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, server_port=None)
    yield gradio_client.Client(address, verbose=False)
    app.close()


def test_programs_look_search_and_read_cards(client):
    found = client.predict(TEXT, SAE, api_name="/look")
    assert "".join(token["text"] for token in found["tokens"][1:]) == TEXT
    park = next(token for token in found["tokens"] if token["text"] == " park")
    assert {"latent": 546, "label": "to the park"}.items() <= max(
        (one for one in park["latents"] if one["latent"] == 546), key=lambda one: one["activation"]
    ).items()
    hits = client.predict("park", SAE, api_name="/search")
    assert hits[0] == {"latent": 546, "label": "to the park", "why": "label"}
    card = client.predict(71, TRANSCODER, api_name="/card")
    assert card["latent"] == 71 and card["source"] == TRANSCODER and card["neighbours"]
    for wrong, said in ((("", SAE, "/look"), "at least one"), ((5000, SAE, "/card"), "latent")):
        with pytest.raises(Exception, match=said):
            client.predict(*wrong[:-1], api_name=wrong[-1])
