"""BatchTopK and what is built on its selection: Matryoshka, Mutual Choice, Feature Choice."""

from itertools import pairwise

import pytest
import torch
from objective_cases import D_IN, a_batch, a_dictionary, a_step, exported, planted

from saert.activations import BatchTopK, JumpReLU
from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives.base import Batch, Step
from saert.train.objectives.batch_topk import BatchTopKObjective, follow
from saert.train.objectives.feature_choice import FeatureChoiceObjective, choose_tokens
from saert.train.objectives.matryoshka import MatryoshkaObjective
from saert.train.objectives.mutual_choice import MutualChoiceObjective
from saert.train.objectives.topk import TopKObjective
from saert.train.objectives.zipf import expected_density, quotas
from saert.train.training import OptimiserConfig, Training

N, D, T = 20, 8, 24
ALL = [BatchTopKObjective, MatryoshkaObjective, MutualChoiceObjective, FeatureChoiceObjective]


# -- against dense formulas ------------------------------------------------------------------------


def a_case(seed: int, skip: bool = False) -> tuple[Dictionary, Batch, Step]:
    """Random float64 weights, biases and tokens, and five dead latents."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d = Dictionary(
        random(N, D),
        random(N, D),
        random(N),
        random(D),
        random(D, D) if skip else None,
        subtract_b_dec=not skip,
    )
    x = random(T, D)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=draw)[:5]] = True
    return d, Batch.of(x, random(T, D) if skip else x, Mesh()), a_step(d, dead=dead)


def dense_scores(d: Dictionary, x: torch.Tensor) -> torch.Tensor:
    return ((x - d.b_dec) if d.subtract_b_dec else x) @ d.W_enc.T + d.b_enc


def rebuilt(d: Dictionary, f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = f @ d.W_dec + d.b_dec
    return y if d.W_skip is None else y + x @ d.W_skip.T


def share(y: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    return (y - estimate).square().sum() / (y - y.mean(0)).square().sum()


def largest_of_all(scores: torch.Tensor, k: int) -> torch.Tensor:
    best = scores.flatten().sort(descending=True, stable=True).indices[: k * len(scores)]
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[best] = True
    return kept.view_as(scores) & (scores > 0)


def dense_aux(d, x, y, reconstruction, among, k_aux):
    scores = dense_scores(d, x).relu() * among
    kept = torch.zeros_like(scores).scatter(1, scores.topk(k_aux).indices, 1)
    return share((y - reconstruction).detach(), (scores * kept) @ d.W_dec)


def agrees(d: Dictionary, total: torch.Tensor, expected: torch.Tensor) -> None:
    """The same loss and the same gradient of every parameter."""
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    parameters = dict(d.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()))
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    for name, mine, theirs in zip(parameters, found, wanted, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_batch_topk_is_its_dense_formula(seed, skip):
    d, batch, step = a_case(seed, skip)
    objective = BatchTopKObjective(3, aux=0.3, k_aux=2)
    objective.prepare(d, batch)
    loss = objective.loss(d, batch, step)
    x, y = batch.x, batch.y
    scores = dense_scores(d, x)
    kept = largest_of_all(scores, 3)
    reconstruction = rebuilt(d, scores * kept, x)
    fvu = share(y, reconstruction)
    aux = dense_aux(d, x, y, reconstruction, step.dead, 2)
    agrees(d, loss.total, fvu + 0.3 * aux)
    torch.testing.assert_close(loss.fvu, fvu.detach())
    torch.testing.assert_close(loss.parts["aux"], aux.detach())
    assert loss.active == 3 * T
    assert torch.equal(loss.fired, ((scores * kept) > 1e-3).any(0))
    torch.testing.assert_close(d.state["threshold"], scores[kept].min().detach())


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("groups", [(1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2), (0.3, 0.7), (1.0,)])
def test_matryoshka_is_the_mean_of_its_prefixes_once(groups, skip):
    d, batch, step = a_case(2, skip)
    objective = MatryoshkaObjective(3, aux=0.3, k_aux=2, groups=groups)
    objective.prepare(d, batch)
    loss = objective.loss(d, batch, step)
    x, y = batch.x, batch.y
    scores = dense_scores(d, x)
    f = scores * largest_of_all(scores, 3)
    ends = {5: [0, 1, 2, 5, 10, 20], 2: [0, 6, 20], 1: [0, 20]}[len(groups)]
    rebuilds = [rebuilt(d, f * (torch.arange(N) < end), x) for end in ends]
    terms = [share(y, r) for r in rebuilds]
    aux = dense_aux(d, x, y, rebuilds[-1], step.dead, 2)
    agrees(d, loss.total, sum(terms) / len(terms) + 0.3 * aux)
    torch.testing.assert_close(loss.fvu, terms[-1].detach())
    for end, term in zip(ends[1:], terms[1:], strict=True):
        torch.testing.assert_close(loss.parts[f"fvu_{end}"], term.detach())
    assert loss.active == 3 * T


@pytest.mark.parametrize("underused", [0.0, 0.5, 5.0])
def test_mutual_choice_is_its_dense_formula(underused):
    d, batch, step = a_case(3)
    objective = MutualChoiceObjective(3, aux=0.3, k_aux=2, underused=underused)
    objective.prepare(d, batch)
    before = d.state["density"]
    other = Batch.of(batch.x.flip(0)[: T // 2], batch.x.flip(0)[: T // 2], Mesh())
    loss = objective.loss(d, other, step)
    x = other.x
    scores = dense_scores(d, x)
    kept = largest_of_all(scores, 3)
    reconstruction = rebuilt(d, scores * kept, x)
    density = 0.1 * before + 0.9 * kept.double().mean(0)  # the decay of step 0
    torch.testing.assert_close(d.state["density"], density)
    among = step.dead | (density < underused * expected_density(density, 3, (0.1, 0.7)))
    assert (among.sum() > 5) == (underused > 0)
    aux = dense_aux(d, x, x, reconstruction, among, 2)
    agrees(d, loss.total, share(x, reconstruction) + 0.3 * aux)


@pytest.mark.parametrize("shape", ["zipf", "uniform"])
def test_feature_choice_is_its_dense_formula(shape):
    d, batch, step = a_case(4)
    objective = FeatureChoiceObjective(3, aux=0.3, k_aux=2, shape=shape, warm=0)
    objective.prepare(d, batch)
    loss = objective.loss(d, batch, step)
    x, scores = batch.x, dense_scores(d, batch.x)
    density = largest_of_all(scores, 3).double().mean(0)
    counts = torch.tensor([4] * 12 + [3] * 8)  # 72 choices of 20 latents
    if shape == "zipf":
        counts = quotas(expected_density(density, 3, (0.1, 0.7)), T, 3 * T)
        assert counts.max() > counts.min() + 2
    kept = torch.zeros_like(scores)
    for i, m in enumerate(counts.tolist()):
        kept[scores[:, i].topk(m).indices, i] = 1
    f = scores.relu() * kept
    reconstruction = rebuilt(d, f, x)
    aux = dense_aux(d, x, x, reconstruction, step.dead, 2)
    agrees(d, loss.total, share(x, reconstruction) + 0.3 * aux)
    assert loss.active == (f > 0).sum()
    assert torch.equal(loss.fired, (f > 1e-3).any(0))
    least = torch.where(f > 0, f, torch.inf).amin(0).detach()
    expected = torch.where(least < torch.inf, least, -1)
    torch.testing.assert_close(d.state["thresholds"], expected)


def test_feature_choice_begins_as_mutual_choice_and_then_keeps_its_ranks():
    batch, losses = a_case(5)[1], []
    for objective in (MutualChoiceObjective(3), FeatureChoiceObjective(3, warm=0.5)):
        d = a_case(5)[0]
        objective.prepare(d, batch)
        losses.append(objective.loss(d, batch, a_step(d, 49)).total)
    assert losses[0] == losses[1]
    assert (d.state["thresholds"] == -1).all()
    frozen = d.state["density"]
    later = objective.loss(d, batch, a_step(d, 50)).total
    assert later != losses[1]
    assert d.state["density"] is frozen and (d.state["thresholds"] > 0).any()


# -- thresholds, laws, quotas ----------------------------------------------------------------------


def test_the_first_threshold_is_assigned_and_the_others_averaged():
    d = a_dictionary()
    average = torch.tensor(-1.0)
    values = torch.rand(40) + 2
    for n, value in enumerate(values):
        average = follow(average, value, a_step(d, n, 40), 0.5)
        if n == 0:
            assert average == value
        if n == 7:
            started = average
    expected = started
    for value in values[8:]:  # (1 + n) / (10 + n) has reached a half
        expected = 0.5 * expected + 0.5 * value
    torch.testing.assert_close(average, expected)
    for n in (0, 1000):  # a batch without a positive score says nothing
        assert follow(average, torch.tensor(0.0), a_step(d, n), 0.5) == average


def test_the_law_is_found_from_the_middle_ranks_although_head_and_tail_break_it():
    n, k = 400, 16
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    law = (ranks + 0.1 * n) ** -1.3
    law *= k / law.sum()
    measured = law.clone()
    measured[:20] *= 1.2
    measured[320:] *= 1e-3  # dying
    order = torch.randperm(n)
    found = expected_density(measured[order], k, (0.1, 0.7))
    torch.testing.assert_close(found, law[order], rtol=1e-6, atol=0)
    flat = expected_density(torch.full((n,), 0.04), k, (0.1, 0.7))
    torch.testing.assert_close(flat, torch.full((n,), k / n, dtype=torch.float64))
    assert expected_density(torch.zeros(n), k, (0.1, 0.7)).sum() == pytest.approx(k)


@pytest.mark.parametrize("total", [50, 51, 77, 400, 1999, 2000])
def test_quotas_are_proportional_integers_within_their_bounds(total):
    weights = torch.rand(50) ** 4 * 10.0 ** torch.randint(-30, 3, (50,))
    for w in (weights, torch.ones(50), torch.arange(50).double()):
        found = quotas(w, 40, total)
        assert found.sum() == total and found.min() >= 1 and found.max() <= 40
        order = w.sort(descending=True, stable=True).indices
        assert all(a >= b for a, b in pairwise(found[order].tolist()))
    found = quotas(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1000, 1000)
    assert found.tolist() == [100, 200, 300, 400]
    with pytest.raises(ValueError, match="do not divide"):
        quotas(torch.ones(50), 40, 49)


def test_latents_choose_the_earlier_of_equal_tokens():
    scores = torch.tensor([[1.0, -1.0, 5.0], [2.0, -2.0, 5.0], [1.0, -1.0, 4.0], [2.0, 0.0, 5.0]])
    kept, least = choose_tokens(scores, torch.tensor([3, 2, 2]), Mesh())
    assert kept.T.tolist() == [
        [True, True, False, True],
        [False] * 4,
        [True, True, False, False],
    ]
    assert least.tolist() == [1, 0, 5]


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_the_export_is_the_code_of_training_but_for_the_entries_at_the_threshold(cls):
    d, batch, step = a_case(6)
    options = {"warm": 0} if cls is FeatureChoiceObjective else {}
    objective = cls(3, **options)
    objective.prepare(d, batch)
    loss = objective.loss(d, batch, step)  # the first batch: θ is its own
    sae = exported(d, objective)
    scores = dense_scores(d, batch.x).detach()
    if cls is FeatureChoiceObjective:
        assert type(sae.activation) is JumpReLU
        kept, least = choose_tokens(scores, objective.counts(d, T), Mesh())
    else:
        assert type(sae.activation) is BatchTopK
        kept = largest_of_all(scores, 3)
        least = scores[kept].min()
    assert kept.sum() == loss.active
    at_threshold = (scores - least).abs() < 1e-12  # excluded, or else a matter of the last digit
    assert at_threshold.sum() <= (N if cls is FeatureChoiceObjective else 1)
    training = scores * (kept & ~at_threshold)
    torch.testing.assert_close(sae.encode(batch.x).to_dense() * ~at_threshold, training)
    alone = torch.cat([sae.encode(row[None]).to_dense() for row in batch.x])
    torch.testing.assert_close(alone * ~at_threshold, training)  # trap 11: whatever the batch mates


def test_feature_choice_without_its_own_thresholds_exports_mutual_choices():
    d, batch, step = a_case(7)
    objective = FeatureChoiceObjective(3, warm=1)
    objective.prepare(d, batch)
    objective.loss(d, batch, step)
    threshold = objective.activation(d.whole()).threshold
    assert torch.equal(threshold, d.state["threshold"].expand(N))


# -- what each is for, on planted data -------------------------------------------------------------


def varied(tokens: int, seed: int) -> torch.Tensor:
    """Tokens with about one feature and tokens with about seven."""
    few = planted(tokens // 2, 2 * seed, active=1)
    return torch.cat([few, planted(tokens // 2, 2 * seed + 1, active=7)])


def fit(objective, seed=0, steps=160, start=lambda d: None, data=varied, latents=48):
    """A dictionary trained on `data`, and the mean of its last logs."""
    d = a_dictionary(latents, seed=seed)
    start(d)
    objective.prepare(d, a_batch(data(512, 10**6)))
    rate = {"lr": 5e-3 / (2**14 / latents) ** 0.5, "betas": (0.9, 0.99)}
    training = Training(d, objective, OptimiserConfig(dead_tokens=5000, **rate), steps)
    logs = [training.step(a_batch(data(256, 1000 * seed + n)), n) for n in range(steps)]
    return d, {name: sum(log[name].item() for log in logs[-20:]) / 20 for name in logs[-1]}


@pytest.fixture(scope="module", params=[0, 1])
def batch_topk(request):
    objective = BatchTopKObjective(4)
    return request.param, objective, *fit(objective, request.param)


def test_batch_topk_explains_no_less_than_topk_where_tokens_differ(batch_topk):
    seed, _, _, log = batch_topk
    _, topk = fit(TopKObjective(4), seed)
    assert log["l0"] == 4
    assert topk["l0"] <= 4
    assert log["fvu"] < 0.9 * topk["fvu"]


def test_batch_topks_threshold_keeps_the_mean_l0_and_lets_tokens_differ(batch_topk):
    _, objective, d, log = batch_topk
    x = varied(2048, 555)
    code = exported(d, objective).encode(x)
    l0 = (code.values > 0).sum(-1).float()
    assert l0.mean() == pytest.approx(4, rel=0.1)
    assert l0[:1024].mean() < 0.6 * l0[1024:].mean()
    estimate = d.decode_dense(code.to_dense()).detach()
    assert share(x, estimate) < 1.1 * log["fvu"]


def test_a_matryoshka_prefix_alone_explains_more_than_as_many_latents_of_batch_topk(batch_topk):
    seed, plain, d, _ = batch_topk
    objective = MatryoshkaObjective(4, groups=(1 / 4, 1 / 4, 1 / 2))
    nested, log = fit(objective, seed)
    x = varied(2048, 555)
    f = exported(nested, objective).encode(x).to_dense()
    mine = share(x, nested.decode_dense(f * (torch.arange(48) < 12)))
    f = exported(d, plain).encode(x).to_dense()
    first = torch.arange(48) < 12
    densest = (f > 0).sum(0).argsort(descending=True).argsort() < 12
    for latents in (first, densest):
        assert mine < 0.95 * share(x, d.decode_dense(f * latents))
    assert log["fvu_12"] > log["fvu_24"] > log["fvu_48"] == log["fvu"]


def weak(d: Dictionary) -> None:
    """A third of the latents starts with positive scores that are too small to be chosen."""
    with torch.no_grad():
        d.W_enc[::3] *= 0.1


def test_aux_zipf_leaves_fewer_latents_silent():
    x, silent = varied(2048, 555), {}
    for aux in (0.0, 1 / 32):
        objective = MutualChoiceObjective(4, aux=aux)
        d, log = fit(objective, steps=80, start=weak)
        assert log["l0"] == 4
        silent[aux] = (~(exported(d, objective).encode(x).to_dense() > 0).any(0)).sum().item()
    assert silent[0.0] >= 10
    assert silent[1 / 32] <= 2


@pytest.mark.parametrize("shape", ["zipf", "uniform"])
def test_every_latent_of_feature_choice_is_used_in_each_batch(shape):
    objective = FeatureChoiceObjective(4, shape=shape, warm=0.25)
    d, log = fit(objective, steps=80)
    assert log["l0"] == 4 and log["dead"] == 0
    for seed in range(3):
        x = varied(256, 555 + seed)
        loss = objective.loss(d, a_batch(x), a_step(d, 99))
        assert loss.fired.all() and loss.active == 4 * 256
    l0 = (exported(d, objective).encode(varied(2048, 777)).values > 0).sum(-1).float()
    assert l0.mean() == pytest.approx(4, rel=0.1)


# -- hyper-parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"aux": -1.0}, {"k_aux": 0}, {"decay": 1.0}, {"decay": -0.1}]
)
def test_impossible_hyperparameters_are_refused(cls, wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{cls.name}:.*{name}"):
        cls(**wrong)


@pytest.mark.parametrize(
    ("cls", "wrong", "said"),
    [
        (MatryoshkaObjective, {"groups": (0.5, 0.6)}, "sum to 1.1"),
        (MatryoshkaObjective, {"groups": (1.5, -0.5)}, "positive shares"),
        (MatryoshkaObjective, {"groups": ()}, "positive shares"),
        (MutualChoiceObjective, {"underused": -1.0}, "underused"),
        (MutualChoiceObjective, {"middle": (0.5, 0.5)}, "middle"),
        (FeatureChoiceObjective, {"shape": "flat"}, "'flat'"),
        (FeatureChoiceObjective, {"warm": 2.0}, "warm"),
    ],
)
def test_their_own_impossible_hyperparameters_are_refused(cls, wrong, said):
    with pytest.raises(ValueError, match=said):
        cls(**wrong)


def test_what_does_not_fit_the_dictionary_is_refused():
    d, batch = a_dictionary(8, D_IN), a_batch(planted(4))
    for cls in ALL:
        with pytest.raises(ValueError, match="k is 9, but there are 8"):
            cls(9).prepare(d, batch)
    with pytest.raises(ValueError, match="every group needs a latent"):
        MatryoshkaObjective(2).prepare(d, batch)
    objective = FeatureChoiceObjective(1, warm=0)
    objective.prepare(d, batch)
    with pytest.raises(ValueError, match="fewer than the 8 latents"):
        objective.loss(d, batch, a_step(d))
