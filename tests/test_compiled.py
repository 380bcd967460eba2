"""attach(compiled=True): what a compiled model computes, and what makes it compile again."""

import copy
import random

import pytest
import torch
from sae_cases import make
from tiny_models import HIDDEN, tiny

from saert.edits import ablate, active, add, add_vector, clamp, scale
from saert.runtime import attach
from saert.sae import SAE

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 93, 2, 38, 46]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
PER_LATENT = ["jumprelu", "batchtopk", "gated", "relu"]
SELECTIVE = [
    add(3, 4.0, phase="generated"),
    scale(5, 2.0, positions=slice(1, -1)),
    add(6, 2.0, rows=1, when=active(7)),
    add_vector(torch.ones(HIDDEN), 0.1, positions=[2, 9, -1]),
]
graphs = 0


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(graph, example_inputs):
    """A torch.compile backend that runs the graph as it is, and counts."""
    global graphs
    graphs += 1
    return graph.forward


def made(act="topk", transform="layer_norm", kind="sae", **options) -> SAE:
    at = {"hookpoint": "resid_post.1"} | ({"d_out": HIDDEN} if kind == "transcoder" else {})
    return make(act, transform, kind, dtype=torch.float32, d_in=HIDDEN, n=64, **(at | options))


def generate(model, compiled=None, tokens=5, **options):
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
    settings |= {"pad_token_id": 0, "attention_mask": MASK} | options
    if compiled is not None:
        from transformers import CompileConfig

        mode = "default" if compiled == "inductor" else None
        config = CompileConfig(backend=compiled, mode=mode, fullgraph=True)
        config._compile_all_devices = True  # on CPU too: the auto-compile of GPUs
        settings |= {"compile_config": config, "cache_implementation": "static"}
    return model.generate(IDS, **settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def eager(model, sae, edits, run, **options):
    """What a plain attachment does with each of the edits."""
    found = []
    for edit in edits:
        with attach(model, sae, edit, **options):
            found.append(run(model))
    return found


# -- generate with a static cache -----------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_edits_change_between_generations_without_compiling_again(name):
    model, sae = copy.deepcopy(tiny(name)), made()
    edits = [SELECTIVE, add(3, 4.0), clamp(5, 6.0, phase="prompt"), (), ablate([3, 5], rows=0)]
    bare = generate(model)
    expected = eager(model, sae, edits, generate)
    assert len({str(tokens.tolist()) for tokens in expected}) > 3
    before = [list(m._forward_hooks) for m in model.modules()]
    with attach(model, sae, SELECTIVE, compiled=True) as attachment:
        assert torch.equal(generate(model, counting), expected[0])
        made_by_then = graphs
        for edit, tokens in zip(edits, expected, strict=True):
            attachment.edits = edit
            assert torch.equal(generate(model, counting), tokens)
        assert graphs == made_by_then
    assert torch.equal(generate(model, counting), bare)
    assert [list(m._forward_hooks) for m in model.modules()] == before


def test_rows_that_ended_beams_and_returned_sequences():
    model, sae = copy.deepcopy(tiny("llama")), made()
    ends = int(generate(model)[0, 8])  # the first row ends after two tokens
    for options in ({"eos_token_id": ends}, {"num_beams": 2, "num_return_sequences": 2}):
        edits = [[scale(5, 3.0), add(3, 6.0, rows=1)], [clamp(5, 4.0, rows=0, positions=[8, -2])]]
        expected = eager(model, sae, edits, lambda m: generate(m, **options))  # noqa: B023
        with attach(model, sae, [e for many in edits for e in many], compiled=True) as attachment:
            for edit, tokens in zip(edits, expected, strict=True):
                attachment.edits = edit
                assert torch.equal(generate(model, counting, **options), tokens)


def test_codes_and_the_report_are_those_of_an_eager_attachment():
    model, sae = copy.deepcopy(tiny("llama")), made()
    with attach(model, sae, SELECTIVE) as attachment:
        generate(model)
        code, report = attachment.codes["resid_post.1"], attachment.report()["resid_post.1"]
    with attach(model, sae, SELECTIVE, compiled=True) as attachment:
        generate(model, counting)
        found = attachment.codes["resid_post.1"]
        assert found.shape == (2, 1, 5)
        torch.testing.assert_close(found.to_dense(), code.to_dense())
        kept = found.to_dense().clone()
        now = attachment.report()["resid_post.1"]
        assert (now.tokens, now.l0) == (report.tokens, report.l0) == (5 + 7 + 8, 5.0)
        assert now.fvu == pytest.approx(report.fvu) and now.error_norm == pytest.approx(
            report.error_norm
        )
        attachment.edits = add(3, 9.0)
        generate(model, counting)
        assert torch.equal(found.to_dense(), kept)  # a copy, not the buffer
        assert attachment.report()["resid_post.1"].tokens == 40
        attachment.clear()
        assert attachment.report()["resid_post.1"].tokens == 0
        with pytest.raises(KeyError, match="no code recorded"):
            attachment.codes["resid_post.1"]
        generate(model, counting)
        assert attachment.report()["resid_post.1"].tokens == 20
    assert attachment.codes["resid_post.1"].shape == (2, 1, 5)  # readable after detach


@pytest.mark.slow
def test_inductor_generates_the_tokens_of_an_eager_attachment():
    model, sae = copy.deepcopy(tiny("llama")), made()
    edits = [SELECTIVE, add(3, 4.0), (), [scale(5, 2.0), clamp(3, 1.0, phase="prompt")]]
    expected = eager(model, sae, edits, generate)
    with attach(model, sae, SELECTIVE, compiled=True) as attachment:
        for edit, tokens in zip(edits, expected, strict=True):
            attachment.edits = edit
            assert torch.equal(generate(model, "inductor"), tokens)


# -- a compiled call ------------------------------------------------------------------------------


CASES = [("topk", "sae", "resid_post.1", False), ("jumprelu", "sae", "resid_post.1", True)]
CASES += [
    pytest.param(act, kind, at, splice, marks=pytest.mark.slow)
    for act, kind, at, splice in [
        ("topk", "transcoder", "mlp_in.1", True),
        ("topk", "transcoder", "mlp_in.1", False),
        ("topk", "sae", "resid_post.1", True),
        ("jumprelu", "sae", "resid_post.1", False),
        ("gated", "sae", "resid_post.1", False),
        ("gated", "sae", "resid_post.1", True),
    ]
]


@pytest.mark.parametrize(("act", "kind", "at", "splice"), CASES)
def test_one_graph_without_breaks_serves_every_edit(act, kind, at, splice):
    model = copy.deepcopy(tiny("llama"))
    target = {"target_hookpoint": "mlp_out.1"} if kind == "transcoder" else {}
    sae = made(act, kind="transcoder_square" if target else kind, hookpoint=at, **target)
    edits = [SELECTIVE, clamp(5, 2.0), [], ablate([3, 9], rows=0), add(7, 3.0, positions=-1)]
    expected = eager(model, sae, edits, logits, splice=splice)
    options = {"splice": splice, "record": "last" if act == "topk" else False}
    with attach(model, sae, SELECTIVE, compiled=True, **options) as attachment:
        compiled = torch.compile(model, fullgraph=True, backend=counting)
        logits(compiled)
        made_by_then = graphs
        for edit, wanted in zip(edits, expected, strict=True):
            attachment.edits = edit
            torch.testing.assert_close(logits(compiled), wanted, rtol=1e-4, atol=1e-5)
        assert graphs == made_by_then


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_with_every_edit_gone_the_logits_are_those_of_the_bare_model(dtype):
    model, sae = copy.deepcopy(tiny("gpt2")).to(dtype), made()
    bare = logits(model)
    with attach(model, sae, SELECTIVE, compiled=True) as attachment:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert not torch.equal(logits(compiled), bare)
        attachment.edits = ()
        torch.testing.assert_close(logits(compiled), bare, rtol=torch.finfo(dtype).eps, atol=0)


STEPS = [  # edits, and whether the graph has to change
    ([], True),
    (add(3, 2.0), True),  # the first slots
    ([add(i, 0.5) for i in range(8)], False),
    ([add(i, 0.5) for i in range(9)], True),  # more slots than there is room for
    (clamp(3, 2.0), True),  # reads the code
    ([clamp(3, 2.0), add(3, 1.0)], True),  # a second round
    (add_vector(torch.ones(HIDDEN), 0.2), True),
    (add(3, 2.0, positions=[2]), True),  # selects
    ([scale(4, 2.0), add_vector(torch.ones(HIDDEN), 0.3, positions=[3])], False),
    (add(3, 2.0, phase="prompt"), True),  # asks where the prompt ends
    (add(3, 2.0, when=active(5)), True),
    ([ablate([3, 4], positions=slice(-3, None)), scale(3, 2.0, rows=1)], False),
    ([add(i, 0.5) for i in range(12)], True),  # edits that act everywhere, but more than ranges
    ([], False),
]


def test_only_what_grows_drops_the_graphs(monkeypatch):
    dropped: list[bool] = []
    model = copy.deepcopy(tiny("llama"))
    monkeypatch.setattr("saert.runtime._forget_compiled", lambda: dropped.append(True))
    with attach(model, made(), compiled=True) as attachment:
        for edit, grows in STEPS[1:]:
            dropped.clear()
            attachment.edits = edit
            assert bool(dropped) == grows, edit


@pytest.mark.slow
def test_what_grows_compiles_once_more_and_nothing_else_does():
    model, sae = copy.deepcopy(tiny("llama")), made()
    expected = eager(model, sae, [edit for edit, _ in STEPS], logits)
    with attach(model, sae, compiled=True) as attachment:
        compiled = torch.compile(model, fullgraph=True, backend=counting)
        for (edit, grows), wanted in zip(STEPS, expected, strict=True):
            attachment.edits = edit
            before = graphs
            torch.testing.assert_close(logits(compiled), wanted, rtol=1e-4, atol=1e-5)
            assert (graphs > before) == grows, edit


def test_adding_alone_never_encodes(monkeypatch):
    model, sae = copy.deepcopy(tiny("llama")), made()
    edits = [add(3, 2.0), [add(4, 1.0, phase="prompt"), add(4, 2.0)]]
    expected = eager(model, sae, edits, logits)
    monkeypatch.setattr(SAE, "encode", lambda *_: pytest.fail("encoded"))
    with attach(model, sae, edits[1], compiled=True, record=False) as attachment:
        compiled = torch.compile(model, fullgraph=True, backend=counting)
        for edit, wanted in zip(edits, expected, strict=True):
            attachment.edits = edit
            torch.testing.assert_close(logits(compiled), wanted)


# -- the tables, uncompiled -----------------------------------------------------------------------


@pytest.mark.parametrize("act", ["topk", *PER_LATENT])
def test_uncompiled_it_does_what_attach_does(act):
    """Random edits of every kind: the selections are worked out in another way."""
    model, rng = tiny("gpt2"), random.Random(act)
    sae = made(act)
    record = "last" if act == "topk" else False
    with attach(model, sae, compiled=True, record=record) as attachment:
        for _ in range(25):
            edits = [random_edit(rng) for _ in range(rng.randrange(1, 7))]
            attachment.edits = edits
            tables = vars(attachment._taps[0]._tables).values()
            addresses = [t.data_ptr() for t in tables if isinstance(t, torch.Tensor)]
            attachment.edits = ()
            attachment.edits = edits
            tables = vars(attachment._taps[0]._tables).values()
            assert addresses == [t.data_ptr() for t in tables if isinstance(t, torch.Tensor)]
            found = logits(model)
            expected = logits_with(sae, edits)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def logits_with(sae, edits):
    with attach(model := tiny("gpt2"), sae, edits):
        return logits(model)


def random_edit(rng):
    ends = [None, 0, 1, 3, 6, 9, -1, -2, -4, -9]
    where = {
        "phase": rng.choice(["all", "all", "prompt", "generated"]),
        "rows": rng.choice([None, None, 0, 1, [0, 1], [1, 1]]),
        "positions": rng.choice(
            [
                None,
                rng.choice(ends[1:]),
                [rng.choice(ends[1:]) for _ in range(3)],
                slice(rng.choice(ends), rng.choice(ends), rng.choice([None, 1, 2, 3])),
            ]
        ),
        "when": rng.choice([None, None, active(rng.randrange(64), rng.choice([0.0, 0.3]))]),
    }
    kind = rng.randrange(5)
    if kind == 4:
        generator = torch.Generator().manual_seed(rng.randrange(9))
        return add_vector(torch.randn(HIDDEN, generator=generator), rng.uniform(-1, 1), **where)
    if kind == 3:
        return ablate([5, 3, 9], to=rng.uniform(0, 2), **where)
    return (add, clamp, scale)[kind](rng.choice([3, 5]), rng.uniform(-2, 2), **where)


# -- what is refused ------------------------------------------------------------------------------


def test_what_tables_cannot_do_is_refused():
    model = copy.deepcopy(tiny("llama"))
    with pytest.raises(ValueError, match="keeps the latest pass"):
        attach(model, made(), compiled=True, record="all")
    with pytest.raises(ValueError, match="JumpReLU have none; pass record=False"):
        attach(model, made("jumprelu"), compiled=True)
    with pytest.raises(ValueError, match="needs a gradient"):
        attach(model, made(), add(3, torch.tensor(1.0, requires_grad=True)), compiled=True)
    with attach(model, made(), add(3, 1.0, rows=2), compiled=True) as attachment:
        with pytest.raises(ValueError, match="the batch has 2 rows"):
            generate(model, counting)
        attachment.edits = add(3, 1.0, phase="prompt")
        hidden = torch.randn(2, 7, HIDDEN)
        with pytest.raises(ValueError, match="unknown here"):  # a 4-D mask
            model(inputs_embeds=hidden, attention_mask=torch.zeros(2, 1, 7, 7))
    assert not hasattr(model, "_saert_tracker")
