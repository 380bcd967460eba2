"""N2G: the trie against walks by hand, the algorithm on latents whose patterns are known."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_cases import ACTIVATIONS, make
from tiny_models import HIDDEN, VOCAB, tiny
from torch import nn

from saert.activations import ReLU, TopK
from saert.measure.n2g.build import Example, Probe, find_patterns, shortest_suffixes
from saert.measure.n2g.examples import Sampler, random_keys
from saert.measure.n2g.explain import explain, neutral_token
from saert.measure.n2g.explanations import Explanations
from saert.measure.n2g.graph import ANY, Graph, Matcher, Pattern
from saert.measure.n2g.splice import explanation_loss
from saert.measure.passes import Encoded, encoded
from saert.sae import SAE
from saert.sparse import SparseCode

A, B, C, D, E, PAD = range(10, 16)
BOS, FILL = 1, 0


# -- the trie -------------------------------------------------------------------------------------


def graph(*patterns):
    return Graph(Pattern(tuple(tokens), start, value) for tokens, start, value in patterns)


def test_a_pattern_matches_where_it_ends():
    assert graph(((A, B), False, 2.0)).predict([A, B, B, A, B]) == [0, 2, 0, 0, 2]


def test_any_token_and_start():
    one = graph(((A, ANY, C), False, 2.0), ((B,), True, 3.0))
    assert one.predict([B, A, E, C, B]) == [3, 0, 0, 2, 0]
    assert graph(((A, ANY), True, 1.0)).predict([A, B, A, B]) == [0, 1, 0, 0]


def test_the_walk_is_greedy_and_does_not_turn_back():
    """OpenAI's own known miss: a, anything, c and a, c do not find `a b b c`."""
    one = graph(((A, ANY, C), False, 1.0), ((A, C), False, 1.0))
    assert one.predict([A, E, C, A, C]) == [0, 0, 1, 0, 1]
    assert one.predict([A, B, B, C]) == [0, 0, 0, 0]
    # a exact edge that leads nowhere is preferred over a wildcard that would have matched
    two = graph(((A, B, C), False, 1.0), ((D, ANY, C), False, 2.0))
    assert two.predict([D, B, C]) == [0, 0, 0]
    assert two.predict([D, E, C]) == [0, 0, 2]


def test_the_first_leaf_ends_the_walk_and_the_last_of_equal_patterns_counts():
    one = graph(((A, B), False, 5.0), ((B,), False, 1.0), ((B,), False, 2.0))
    assert one.predict([A, B]) == [0, 2]
    assert len(one.patterns) == 1  # what no walk reaches is no pattern
    assert graph(((B,), True, 1.0), ((B,), False, 2.0)).predict([B, B]) == [2, 2]


def test_a_graph_of_wildcards_is_wild():
    assert graph(((ANY, ANY), False, 1.0), ((A,), False, 1.0)).wild
    assert not graph(((ANY,), True, 1.0), ((A, ANY), False, 1.0)).wild


def test_an_empty_graph_and_an_empty_pattern():
    assert graph().predict([A, B]) == [0, 0]
    assert Matcher([graph()])(torch.tensor([[A, B]])).tokens.numel() == 0
    assert Matcher([])(torch.tensor([[A, B]])).tokens.numel() == 0
    with pytest.raises(ValueError, match="without tokens"):
        graph(((), False, 1.0))


@pytest.mark.parametrize("first", [0, 1])
def test_the_table_walks_as_the_graphs_do(first):
    rng = random.Random(0)
    for _ in range(60):
        size = rng.choice([2, 3, 5])
        words = [ANY, *range(size)]
        graphs = [
            Graph(
                Pattern(
                    tuple(rng.choice(words) for _ in range(rng.randint(1, 4))),
                    rng.random() < 0.3,
                    rng.random() + 0.1,
                )
                for _ in range(rng.randint(0, 6))
            )
            for _ in range(5)
        ]
        rows = torch.randint(0, size + 2, (3, 8))  # and tokens that no graph knows
        found = Matcher(graphs)(rows, first)
        dense = torch.zeros(3 * 8, 5, dtype=torch.float64)
        dense.index_put_((found.tokens, found.graphs), found.values, accumulate=True)
        truth = torch.zeros(3, 8, 5, dtype=torch.float64)
        for r, row in enumerate(rows.tolist()):
            for g, one in enumerate(graphs):
                truth[r, first:, g] = torch.tensor(one.predict(row[first:])).double()
        torch.testing.assert_close(dense.view(3, 8, 5), truth)


def test_patterns_to_read():
    names = {A: "the", B: "a", C: "dog", D: "cat", E: "|"}
    one = graph(
        ((A, ANY, C), True, 2.0), ((B, ANY, C), True, 4.0), ((E, D), False, 1.0), ((D, C), True, 9)
    )
    assert one.lines(names.__getitem__) == [
        "[START] cat dog  9.00",
        "[START] the|a * dog  2.00–4.00",
        "| cat  1.00",
    ]
    # merged only where every combination is a pattern
    three = graph(((A, C), False, 1.0), ((B, C), False, 1.0), ((A, D), False, 1.0))
    assert three.lines(names.__getitem__) == ["the|a dog  1.00", "the cat  1.00"]


# -- building, on functions of tokens -------------------------------------------------------------


def activate_with(rule):
    """A latent that is a function of the tokens so far."""
    return lambda sequences, latents: [float(rule(s)) for s in sequences]


def built(rule, *texts, longest=None):
    examples = [Example(0, tuple(text), float(rule(tuple(text)))) for text in texts]
    return find_patterns(activate_with(rule), examples, PAD, longest)


def test_a_token_anywhere():
    assert built(lambda s: 3.0 * (s[-1] == C), [A, B, C]) == [Pattern((C,), False, 3.0)]


def test_a_token_at_the_start_only():
    (found,) = built(lambda s: 2.0 * (s == (A,)), [A])
    assert found == Pattern((A,), True, 2.0)
    # of the first position, whatever the token
    assert built(lambda s: float(len(s) == 1), [B]) == [Pattern((ANY,), True, 1.0)]


def test_a_gap_is_a_wildcard():
    def rule(s):
        return 4.0 * (s[-1] == C and A in s[:-1])

    assert built(rule, [D, A, B, C], [A, C]) == [
        Pattern((A, ANY, C), False, 4.0),
        Pattern((A, C), False, 4.0),
    ]


def test_half_of_the_activation_is_enough_and_less_is_not():
    def rule(s):  # 1 for c, and a little more for each of the two tokens before it
        return (s[-1] == C) * (1.0 + 0.6 * (s[-2:-1] == (B,)) + 0.6 * (s[-3:-2] == (A,)))

    (found,) = built(rule, [D, A, B, C])  # 2.2: c alone has 1.0, b c has 1.6
    assert found == Pattern((ANY, C), False, 1.6)
    (found,) = built(lambda s: 0.5 + 0.5 * (len(s) > 1), [A, B])
    assert found == Pattern((ANY,), False, 0.5)  # exactly half


def test_before_a_padding_token_half_of_the_whole_activation_has_to_remain():
    values = {(A, C): 2.0, (C,): 1.2, (PAD, C): 0.9}  # 0.9 is half of 1.2, but not of 2.0
    (found,) = built(lambda s: values.get(s, 0.0), [A, C])
    assert found == Pattern((C,), True, 1.2)


def test_where_no_suffix_has_half_the_whole_text_is_taken_with_its_own_activation():
    activate = activate_with(lambda s: 0.1)
    (found,) = shortest_suffixes(activate, [Example(0, (A, B, C, D, E), 3.0)])
    assert (found.tokens, found.value) == ((A, B, C, D, E), 3.0)


def test_a_suffix_that_fills_the_model_counts_as_bound_to_the_start():
    asked = []

    def activate(sequences, latents):
        asked.extend(sequences)
        return [float(len(s) >= 3) for s in sequences]

    examples = [Example(0, (A, B, C), 1.0)]
    assert find_patterns(activate, examples, PAD, 3)[0].at_start
    assert max(map(len, asked)) == 3
    assert not find_patterns(activate, examples, PAD, 4)[0].at_start


def test_the_shortest_suffix_of_every_length():
    """Against trying lengths one by one, on rules that a longer suffix may break again."""
    rng = random.Random(1)
    for _ in range(200):
        text = tuple(rng.randrange(10) for _ in range(rng.randint(1, 20)))
        good = {n for n in range(1, len(text)) if rng.random() < 0.1} | {len(text)}
        activate = activate_with(lambda s, good=good: float(len(s) in good))
        (found,) = shortest_suffixes(activate, [Example(0, text, 1.0)])
        assert len(found.tokens) == min(good)


# -- sampling -------------------------------------------------------------------------------------


def passes(dense, batch):
    """Encoded batches of known activations [rows, context, num_latents]."""
    for part in dense.split(batch):
        rows = torch.zeros(part.shape[:2], dtype=torch.int64)
        used = torch.ones_like(rows, dtype=torch.bool)
        yield Encoded(rows, used, part, part, SparseCode.from_dense(part))


def test_samples_are_real_activations_and_do_not_depend_on_batches_or_on_other_latents():
    dense = torch.rand(12, 7, 5) * (torch.rand(12, 7, 5) < torch.tensor([0.9, 0.5, 0.1, 0.02, 0]))
    whole = Sampler(5, 8, seed=3).read(passes(dense, 12))
    parts = Sampler(5, 8, seed=3).read(passes(dense, 5))
    one = Sampler(5, 8, seed=3).read(passes(dense, 2), torch.tensor([False, True] + 3 * [False]))
    assert torch.equal(whole.counts, (dense > 0).sum((0, 1))) and whole.tokens == 84
    for latent in range(5):
        tokens, values = whole.of(latent)
        assert len(tokens) == len(set(tokens)) == min(8, int(whole.counts[latent]))
        assert dense.view(-1, 5)[tokens, latent].tolist() == pytest.approx(values)
        assert parts.of(latent) == (tokens, values)
    assert one.of(1) == whole.of(1) and one.of(0) == ([], [])
    assert Sampler(5, 8, seed=4).read(passes(dense, 12)).of(0) != whole.of(0)


def test_merging_early_changes_nothing(monkeypatch):
    dense = torch.rand(30, 6, 4)
    whole = Sampler(4, 5, seed=0).read(passes(dense, 30))
    monkeypatch.setattr("saert.measure.n2g.examples.WAITING", 7)
    parts = Sampler(4, 5, seed=0).read(passes(dense, 1))
    assert [parts.of(i) for i in range(4)] == [whole.of(i) for i in range(4)]


def test_every_activation_is_equally_likely_and_so_is_every_order():
    """χ² over 4,000 seeds: which 3 of 12 activations, and which of them comes first."""
    dense = torch.zeros(1, 30, 1)
    where = torch.arange(0, 24, 2)
    dense[0, where, 0] = 1.0
    (seen,) = passes(dense, 1)
    kept, first = np.zeros(30), np.zeros(30)
    for seed in range(4000):
        tokens, _ = Sampler(1, 3, seed).read([seen]).of(0)
        kept[tokens] += 1
        first[tokens[0]] += 1
    for counts, total in ((kept, 12000), (first, 4000)):
        counts = counts[where.numpy()]
        assert counts.sum() == total
        expected = total / 12
        # 11 degrees of freedom: 31.3 is exceeded once in a thousand
        assert ((counts - expected) ** 2 / expected).sum() < 31.3


def test_keys_are_splitmix64():
    # the first outputs of the published generator for the seed 1234567
    state, gamma, found = 1234567, 0x9E3779B97F4A7C15, []
    from saert.measure.n2g.examples import _mix

    for i in range(3):
        found.append(int(_mix(np.array([(state + i * gamma) % 2**64], np.uint64))[0]))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = random_keys(0, np.arange(1000), np.zeros(1000, np.int64))
    assert len(set(keys.tolist())) == 1000


# -- a model whose latents are known functions of the tokens ---------------------------------------


class Reader(nn.Module):
    """A block whose output says of each position: this token, the one before it, is it the first?

    One-hot, so that an encoder row can ask for any combination. Behind it a head, so that there is
    a loss.
    """

    def __init__(self, first=0):
        super().__init__()
        self.first = first  # 1: the row begins with a BOS, and the position behind it is the first
        self.marked = first
        self.block = nn.Identity()
        torch.manual_seed(0)
        self.head = nn.Linear(2 * VOCAB + 1, VOCAB)
        self.base_model = self.forward_base
        self.config = SimpleNamespace(max_position_embeddings=64, model_type="reader")
        self.config.get_text_config = lambda: self.config
        self.eval()
        self.base_model_prefix = ""

    def forward_base(self, rows, use_cache=False):
        now = nn.functional.one_hot(rows, VOCAB)
        before = torch.zeros_like(now)
        before[:, 1 + self.first :] = now[:, self.first : -1]
        marked = (torch.arange(rows.shape[1]) == self.marked).expand(*rows.shape).unsqueeze(-1)
        return self.block(torch.cat([now, before, marked], -1).float())

    def forward(self, rows, use_cache=False):
        return SimpleNamespace(logits=self.head(self.forward_base(rows)))


def reads(*, now=None, before=None, start=False, value=2.0):
    """An encoder row and bias: relu is `value` where all of these hold, 0 elsewhere."""
    row = torch.zeros(2 * VOCAB + 1)
    asked = [
        *([now] if now is not None else []),
        *([VOCAB + before] if before is not None else []),
        *([2 * VOCAB] if start else []),
    ]
    row[asked] = value
    return row, -value * (len(asked) - 1)


LATENTS = [
    dict(now=A),
    dict(now=B, before=A),
    dict(now=C, start=True),
    dict(before=D, value=3.0),
    dict(start=True),
    dict(now=90, value=1.0),  # a token that the text does not have
]
EXPECTED = [
    [Pattern((A,), False, 2.0)],
    [Pattern((A, B), False, 2.0)],
    [Pattern((C,), True, 2.0)],
    [Pattern((D, ANY), False, 3.0)],
    [Pattern((ANY,), True, 2.0)],
    [],
]


def reader_sae(activation=None, **options):
    rows, biases = zip(*(reads(**one) for one in LATENTS), strict=True)
    W_enc = torch.stack(rows)
    torch.manual_seed(1)
    W_dec = torch.randn_like(W_enc) * 0.3
    return SAE.from_weights(
        W_enc,
        W_dec,
        torch.tensor(biases),
        torch.randn(W_enc.shape[1]) * 0.1,
        activation=activation or ReLU(),
        hookpoint="block",
        subtract_b_dec=False,
        **options,
    )


def reader_rows(n=60, context=12, bos=False):
    rows = torch.randint(A, A + 5, (n, context), generator=torch.Generator().manual_seed(0))
    if bos:
        rows[:, 0] = BOS
    return rows


def explained(model, sae, rows, latents=None, **options):
    return explain(model, sae, rows, latents, pad_token=PAD, progress=False, **options)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("activation", [ReLU(), TopK(6)])
def test_known_latents_are_recovered_exactly(bos, activation):
    model, sae, rows = Reader(first=int(bos)), reader_sae(activation), reader_rows(bos=bos)
    found = explained(model, sae, rows, range(6))
    assert found.settings["bos"] == (BOS if bos else None)
    for one, expected, latent in zip(found, EXPECTED, LATENTS, strict=True):
        assert list(one.graph.patterns) == expected
        truth = torch.tensor([torch.nan if not expected else 1.0])
        torch.testing.assert_close(torch.tensor([one.recall]), truth, equal_nan=True)
        torch.testing.assert_close(torch.tensor([one.precision]), truth, equal_nan=True)
        known = torch.tensor([one.correlation])
        torch.testing.assert_close(known, truth, equal_nan=True)
        now = rows[:, bos:]
        fires = torch.ones_like(now, dtype=torch.bool)
        if "now" in latent:
            fires &= now == latent["now"]
        if "before" in latent:
            fires[:, 0] = False
            fires[:, 1:] &= now[:, :-1] == latent["before"]
        if "start" in latent:
            fires[:, 1:] = False
        assert (one.active, one.tokens) == (int(fires.sum()), now.numel())
        half = -(-one.active // 2)
        assert (one.train, one.heldout) == (min(16, half), min(16, one.active - half))
        assert one.predicted == one.correct == one.active - one.train
    code = found.predict(rows).to_dense()
    true = torch.cat([seen.code.to_dense() for seen in encoded(model, sae, rows)])
    torch.testing.assert_close(code[:, bos:], true[:, bos:])
    assert not code[:, :bos].any()


def test_all_latents_that_fire_or_a_sample_of_them_that_grows():
    model, sae, rows = Reader(), reader_sae(), reader_rows()
    every = explained(model, sae, rows)
    assert every.latents == [0, 1, 2, 3, 4]
    two, three = (explained(model, sae, rows, sample=n) for n in (2, 3))
    assert set(two.latents) < set(three.latents) < set(every.latents)
    for one in three:
        assert one == every.of(one.latent)
    assert explained(model, sae, rows, [3, 1, 3]).latents == [3, 1]


def test_precision_recall_and_correlation_by_hand():
    """A latent of `a b` and, weaker, `c b`, explained from one example of it."""
    row, bias = reads(now=B, before=A)
    row[VOCAB + C] = 1.0
    sae = SAE.from_weights(
        torch.stack([row, row * 0]),
        torch.randn(2, 2 * VOCAB + 1),
        torch.tensor([bias + 0.5, -1.0]),
        activation=ReLU(),
        hookpoint="block",
    )
    model, rows = Reader(), reader_rows(n=20)
    found = explained(model, sae, rows, [0, 1], train=1, heldout=1000)
    one, silent = found
    true = torch.cat([seen.code.to_dense() for seen in encoded(model, sae, rows)])[..., 0]
    guess = found.predict(rows).to_dense()[..., 0]
    tokens, _ = Sampler(2, 1001, 0).read(encoded(model, sae, rows)).of(0)
    counted = torch.ones(rows.numel(), dtype=torch.bool)
    counted[tokens[0]] = False
    t, p = true.flatten()[counted].double(), guess.flatten()[counted].double()
    assert one.train == 1 and one.heldout == one.active - 1 == int((t > 0).sum())
    assert one.recall == pytest.approx((p[t > 0] > 0).double().mean().item())
    assert 0 < one.recall < 1
    assert one.precision == pytest.approx((t[p > 0] > 0).double().mean().item())
    assert one.predicted == int((p > 0).sum())
    assert one.correlation == pytest.approx(np.corrcoef(t, p)[0, 1])
    assert (silent.active, silent.predicted, silent.graph) == (0, 0, Graph())
    assert all(math.isnan(v) for v in (silent.recall, silent.precision, silent.correlation))
    # other rows for precision: nothing is left out there
    other = explained(model, sae, rows, [0], train=1, heldout=5, evaluation=rows[:7])[0]
    p, t = guess[:7] > 0, true[:7] > 0
    assert (other.predicted, other.correct) == (int(p.sum()), int((p & t).sum()))


def test_a_latent_with_few_activations_splits_them():
    model, sae = Reader(), reader_sae()
    rows = torch.full((4, 12), E)
    rows[:, 3] = A
    (one,) = explained(model, sae, rows, [0], train=16, heldout=16)
    assert (one.train, one.heldout, one.recall) == (2, 2, 1.0)
    (one,) = explained(model, sae, rows[:1].repeat(1, 2)[:, :8], [0])
    assert (one.train, one.heldout) == (1, 0) and math.isnan(one.recall)


def test_special_and_padding_positions_count_nowhere():
    model, sae, rows = Reader(), reader_sae(), reader_rows(n=30)
    rows[::2, 8:] = FILL
    rows[:, 4] = A
    sae.b_enc.data[0] = 1.0  # latent 0 now fires on everything, padding as well

    def special(part):
        return (part == FILL) | (part == A)

    (one,) = explained(model, sae, rows, [0], special=special)
    used = ~special(rows)
    assert (one.active, one.tokens) == (int(used.sum()), int(used.sum()))
    assert one.predicted == one.correct == one.active - 16


# -- probes on real models -----------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_probe_sees_what_a_plain_pass_sees(act, name):
    model = tiny(name)
    sae = make(act, "layer_norm", dtype=torch.float32, d_in=HIDDEN, hookpoint="resid_post.1")
    texts = [tuple(torch.randint(3, VOCAB, (n,)).tolist()) for n in (1, 5, 9, 5, 2)]
    texts += [texts[1]] * 3
    latents = [0, 3, 5, 7, 9, 3, 4, 11]
    probe = Probe(model, sae, before=(BOS,), tokens=24)
    for text, latent, value in zip(texts, latents, probe(texts, latents), strict=True):
        (seen,) = encoded(model, sae, torch.tensor([(BOS, *text)]))
        truth = seen.code.to_dense()[0, -1, latent].item()
        assert value == pytest.approx(truth, abs=1e-4)
    assert probe([], []) == []


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_in_bfloat16_and_transcoders(act):
    model = tiny("gpt2").to(torch.bfloat16)
    rows = torch.randint(3, VOCAB, (6, 10))
    for kind, options in (("sae", {}), ("transcoder", {"hookpoint": "mlp_in.1"})):
        sae = make(act, kind=kind, dtype=torch.float32, d_in=HIDDEN, **options)
        if kind == "transcoder":
            assert sae.is_transcoder
        found = explained(model, sae, rows, sample=3, train=2, heldout=2)
        assert all(one.graph.patterns for one in found)
        assert all(one.train <= 2 and one.heldout <= 2 for one in found)


class Late(Reader):
    """Marks the twelfth position instead of the first, and takes no thirteenth."""

    def forward_base(self, rows, use_cache=False):
        assert rows.shape[1] <= self.config.max_position_embeddings
        return super().forward_base(rows)


@pytest.mark.parametrize("bos", [False, True])
def test_a_row_as_long_as_the_model_does_not_overflow_it(bos):
    model, rows = Late(first=int(bos)), reader_rows(bos=bos)
    model.config.max_position_embeddings, model.marked = 12, 11
    (one,) = explained(model, reader_sae(), rows, [4])
    assert one.graph.patterns == (Pattern((ANY,) * (12 - bos), True, 2.0),)
    assert (one.active, one.recall, one.precision) == (60, 1.0, 1.0)


# -- explanation reconstruction ------------------------------------------------------------------


def perfect(sae, rows):
    return explained(Reader(), sae, rows, range(6))


def test_perfect_predictions_cost_what_the_splice_costs():
    model, sae, rows = Reader(), reader_sae(), reader_rows(n=12)
    found = explanation_loss(model, sae, perfect(sae, rows), rows, progress=False, batch=5)
    for name in ("ce", "kl", "fvu"):
        value = getattr(found.explained, name)
        assert value == pytest.approx(getattr(found.spliced, name), rel=1e-6)
        assert value == pytest.approx(getattr(found.true, name), rel=1e-6)
    assert found.recovered == pytest.approx(1.0)
    assert (found.tokens, found.latents) == (12 * 11, 6)


@pytest.mark.parametrize("others", ["drop", "keep"])
def test_the_loss_is_that_of_a_plain_splice_of_the_predicted_code(others):
    """Against a forward pass written out: x̂ of dense codes, cross-entropy and KL in float64."""
    model, sae, rows = Reader(), reader_sae(), reader_rows(n=6)
    explanations = explained(model, sae, rows, [1, 3], train=1, heldout=1)
    wrong = replace(explanations[0], graph=graph(((A,), False, 1.5)))
    explanations = Explanations((wrong, explanations[1]), explanations.settings)

    def special(part):
        return part == E

    found = explanation_loss(
        model, sae, explanations, rows, others=others, special=special, progress=False
    )
    x = model.forward_base(rows).double()
    f = (x @ sae.W_enc.double().T + sae.b_enc.double()).relu()
    predicted = explanations.predict(rows).to_dense().double()
    chosen = torch.tensor([False, True, False, True, False, False])
    kept = f * ~chosen if others == "keep" else f * 0
    codes = {
        "spliced": f,
        "true": f if others == "keep" else f * chosen,
        "explained": kept + predicted,
        "empty": kept,
    }
    used, counted = ~special(rows), ~special(rows)[:, 1:]

    def log_p(hidden):
        weight, bias = model.head.weight.double(), model.head.bias.double()
        return (hidden @ weight.T + bias).log_softmax(-1)[:, :-1][counted]

    plain, following = log_p(x), rows[:, 1:][counted]
    y = x[used]
    for name, code in codes.items():
        new = code @ sae.W_dec.double() + sae.b_dec.double()
        log_q = log_p(torch.where(used.unsqueeze(-1), new, x))
        ce = -log_q.gather(-1, following.unsqueeze(-1)).mean()
        kl = (plain.exp() * (plain - log_q)).sum(-1).mean()
        fvu = (y - new[used]).square().sum() / (y - y.mean(0)).square().sum()
        loss = getattr(found, name)
        assert (loss.ce, loss.kl, loss.fvu) == pytest.approx(
            (ce.item(), kl.item(), fvu.item()), rel=1e-4
        )
    assert found.ce == pytest.approx(-plain.gather(-1, following.unsqueeze(-1)).mean().item())
    assert found.tokens == int(counted.sum())
    assert found.recovered == pytest.approx(
        (found.empty.ce - found.explained.ce) / (found.empty.ce - found.true.ce)
    )


def test_a_transcoder_is_spliced_where_it_writes():
    model = tiny("gpt2")
    sae = make(
        "relu", kind="transcoder_square", dtype=torch.float32, d_in=HIDDEN,
        hookpoint="mlp_in.0",
    )  # fmt: skip
    rows = torch.randint(3, VOCAB, (4, 10))
    explanations = explained(model, sae, rows, train=2, heldout=2)
    found = explanation_loss(model, sae, explanations, rows, progress=False)
    with torch.no_grad():
        from saert.runtime import attach

        with attach(model, sae, splice=True):
            truth = model(rows, labels=rows).loss.item()
    assert found.spliced.ce == pytest.approx(truth, rel=1e-5)
    assert found.explained.ce != found.spliced.ce


# -- files and bad input --------------------------------------------------------------------------


def same(left, right):
    return [one.to_dict() for one in left] == [one.to_dict() for one in right]


def test_files_tables_and_json(tmp_path):
    found = explained(Reader(), reader_sae(), reader_rows(), range(6))
    found.save(tmp_path / "n2g.jsonl")
    loaded = Explanations.load(tmp_path / "n2g.jsonl")
    assert same(loaded, found) and loaded.settings == found.settings
    assert loaded[3].graph == found[3].graph
    answer = json.loads(found.to_json())
    assert answer["summary"]["latents"] == 6 and answer["summary"]["recall"] == 1.0
    assert answer["summary"]["wild"] == 0
    assert answer["explanations"][3]["patterns"][0]["tokens"] == [D, None]
    assert answer["explanations"][5]["recall"] is None
    assert answer["summary"]["by_density"]["never active"]["latents"] == 1
    table = pytest.importorskip("pandas") and found.to_pandas()
    assert table["latent"].tolist() == list(range(6)) and table["precision"][1] == 1.0
    assert "6 latents" in repr(found)
    with pytest.raises(KeyError):
        found.of(17)
    (tmp_path / "other").write_text('{"no": 1}\n')
    with pytest.raises(ValueError, match="expected explanations"):
        Explanations.load(tmp_path / "other")


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model, sae, rows = Reader(), reader_sae(), reader_rows()
    path = tmp_path / "n2g.jsonl"
    whole = explained(model, sae, rows, range(5))
    monkeypatch.setattr("saert.measure.n2g.explain.GROUP", 2)
    first = explained(model, sae, rows, [0, 1, 2], out=path)
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and same(first, whole[:3])
    # killed while it wrote the last line
    path.write_text("\n".join([*lines[:3], lines[3][: len(lines[3]) // 2]]))
    asked = []
    from saert.measure.n2g import drafts

    build = drafts.Maker.drafts
    monkeypatch.setattr(
        drafts.Maker, "drafts", lambda self, ls: asked.extend(ls) or build(self, ls)
    )
    assert same(explained(model, sae, rows, range(5), out=path), whole)
    assert asked == [2, 3, 4]
    assert same(Explanations.load(path), whole)
    monkeypatch.setattr(drafts.Maker, "drafts", None)
    assert same(explained(model, sae, rows, [4, 0], out=path), [whole[4], whole[0]])
    with pytest.raises(ValueError, match="was made with seed=0, found 1"):
        explained(model, sae, rows, range(5), out=path, seed=1)
    shifted, subtracting = reader_sae(), reader_sae()
    shifted.b_enc.data[5] += 1
    subtracting.subtract_b_dec = True
    for changed in (shifted, subtracting, reader_sae(TopK(2))):
        with pytest.raises(ValueError, match="was made with sae="):
            explained(model, changed, rows, range(5), out=path)
    with pytest.raises(ValueError, match="was made with rows="):
        explained(model, sae, rows.reshape(-1, rows.shape[1] * 2), range(5), out=path)
    next(model.parameters()).data.mul_(1.5)
    with pytest.raises(ValueError, match="was made with model="):
        explained(model, sae, rows, range(5), out=path)


def test_bad_input_is_refused():
    model, sae, rows = Reader(), reader_sae(), reader_rows()
    behind_bos = explained(Reader(first=1), sae, reader_rows(bos=True), [0])
    with pytest.raises(ValueError, match="has to begin every row"):
        behind_bos.predict(rows)
    for wrong, message in (
        (dict(latents=[6]), r"latents \[6\], the SAE has 0 to 5"),
        (dict(train=0), "train=0"),
        (dict(sample=0), "sample=0"),
        (dict(bos=50), "bos is 50"),
    ):
        with pytest.raises(ValueError, match=message):
            explained(model, sae, rows, **wrong)
    for bad in (rows.float(), rows[0], rows[:0]):
        with pytest.raises(ValueError, match="expected token ids"):
            explained(model, sae, bad)
    homeless = reader_sae()
    homeless.hookpoint = None
    with pytest.raises(ValueError, match="does not say where it reads"):
        explained(model, homeless, rows)
    found = explained(model, sae, rows, [0])
    with pytest.raises(ValueError, match="others is 'x'"):
        explanation_loss(model, sae, found, rows, others="x", progress=False)
    with pytest.raises(ValueError, match="2 tokens or more"):
        explanation_loss(model, sae, found, rows[:, :1], progress=False)
    with pytest.raises(ValueError, match="no next token"):
        explanation_loss(model, sae, found, rows, special=lambda r: r >= 0, progress=False)
    broken = reader_sae()
    broken.b_enc.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        explained(model, broken, rows)


def test_the_neutral_token():
    from saert.hub import bundled

    tokenizer = bundled.tokenizer()
    assert tokenizer.decode([neutral_token(tokenizer)]) == "_"
    with pytest.raises(ValueError, match="choose pad_token"):
        neutral_token(lambda text, add_special_tokens: {"input_ids": [1, 2]})


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    rows = torch.randint(3, VOCAB, (6, 10))
    found = []
    for device in ("cpu", "cuda"):
        model = tiny("gpt2").to(device)
        sae = make("topk", dtype=torch.float32, d_in=HIDDEN, hookpoint="resid_post.1").to(device)
        one = explained(model, sae, rows, train=3, heldout=3, special=lambda part: part == 5)
        loss = explanation_loss(model, sae, one, rows.to(device), progress=False)
        found.append((one, loss))
    (cpu, cpu_loss), (gpu, gpu_loss) = found
    assert [one.latent for one in cpu] == [one.latent for one in gpu]
    same_lines = [a.graph.lines() == b.graph.lines() for a, b in zip(cpu, gpu, strict=True)]
    assert sum(same_lines) >= 0.8 * len(cpu)
    assert gpu_loss.explained.ce == pytest.approx(cpu_loss.explained.ce, rel=0.02)
    assert gpu_loss.spliced.ce == pytest.approx(cpu_loss.spliced.ce, rel=1e-4)
