"""Probes on latents: the fit against scikit-learn and brute force, and what is said about it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from saert import _cli_compare, _cli_probe
from saert.measure import Probes, sparse_probe
from saert.measure.probes.newton import Columns, fit_latents
from saert.measure.probes.probing import as_text, binary_tasks, scores, stratified
from saert.measure.probes.results import Probe
from saert.sparse import SparseCode

N, LATENTS = 300, 40


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def some_code(n=N, latents=LATENTS, seed=0):
    """Latents from rare to always on, in very different units."""
    g = draw(seed)
    often = torch.linspace(0.01, 1.0, latents)
    dense = (torch.rand(n, latents, generator=g) < often) * torch.rand(n, latents, generator=g)
    return SparseCode.from_dense(dense.float() * torch.logspace(-3, 3, latents))


def some_labels(n=N, seed=1, share=0.3):
    return torch.rand(n, generator=draw(seed)) < share


def sklearn_fit(z, y, ridge):
    """The same minimum by scikit-learn, on z / √mean z²; weight, bias and loss in units of z."""
    s = np.sqrt((z**2).mean())
    fit = LogisticRegression(C=1 / (ridge * len(z)), solver="newton-cholesky", tol=1e-12)
    fit.set_params(max_iter=1000).fit((z / s)[:, None], y)
    w, b = fit.coef_[0, 0] / s, fit.intercept_[0]
    logit = w * z + b
    return w, b, (np.logaddexp(0, logit) - y * logit).mean()


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_every_latent_has_the_fit_of_scikit_learn(ridge):
    code, y = some_code(), some_labels()
    fits = fit_latents(Columns.from_code(code), y, ridge=ridge)
    assert bool(fits.converged.all())
    dense = code.to_dense().double().numpy()
    for latent in range(LATENTS):
        if not dense[:, latent].any():
            continue
        w, b, loss = sklearn_fit(dense[:, latent], y.numpy(), ridge)
        assert abs(fits.losses[latent] - loss) < 1e-9
        assert fits.weights[latent].item() == pytest.approx(w, rel=1e-6)
        assert fits.biases[latent].item() == pytest.approx(b, rel=1e-6)


def test_a_silent_latent_has_the_loss_of_the_base_rate():
    code, y = some_code(), some_labels()
    code = SparseCode(code.indices, code.values, LATENTS + 2)
    fits = fit_latents(Columns.from_code(code), y)
    p = float(y.double().mean())
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert fits.losses[-1].item() == pytest.approx(entropy, abs=1e-12)
    assert fits.weights[-1] == 0 and fits.biases[-1].item() == pytest.approx(math.log(p / (1 - p)))
    assert bool(fits.converged[-1]) and fits.losses.max() <= entropy + 1e-12


@pytest.mark.parametrize("case", ["exact", "one_sided", "reverse", "one_example", "constant"])
def test_separable_latents_end_at_the_minimum_of_the_ridge(case):
    """Without the ridge these go to infinity; the minimum is scipy's on a fine scale."""
    y = torch.arange(50) < 20
    z = {
        "exact": y * 1e-3,
        "one_sided": (torch.arange(50) < 7) * 5.0,
        "reverse": ~y * 1e4,
        "one_example": (torch.arange(50) == 3) * 0.2,
        "constant": torch.full((50,), 2.0),
    }[case].float()
    ridge = 1e-6
    fits = fit_latents(Columns.from_code(SparseCode.from_dense(z[:, None])), y, ridge=ridge)
    assert bool(fits.converged.all())
    zn, yn = (z.double() / z.double().square().mean().sqrt()).numpy(), y.numpy()

    def objective(p):
        logit = p[0] * zn + p[1]
        return (np.logaddexp(0, logit) - yn * logit).mean() + ridge / 2 * p[0] ** 2

    found = objective([fits.weights[0].item() * float(z.double().square().mean().sqrt()),
                       fits.biases[0].item()])  # fmt: skip
    best = min(
        minimize(objective, start, method="Nelder-Mead", options=dict(xatol=1e-9, fatol=1e-15))
        .fun for start in ([0.0, 0.0], [15.0, -5.0], [-15.0, 5.0])
    )  # fmt: skip
    assert found <= best + 1e-10


def test_heavy_tails_that_throw_plain_newton_off_are_fitted():
    """Full steps end at losses of 1e3 to 1e200 on a dozen of these latents; halved ones do not."""
    g = draw(0)
    z = torch.randn(200, 400, generator=g).abs() ** (torch.rand(400, generator=g) * 8)
    z *= torch.rand(200, 400, generator=g) < torch.rand(400, generator=g)
    y = torch.rand(200, generator=g) < 0.02
    fits = fit_latents(Columns.from_code(SparseCode.from_dense(z)), y)
    assert bool(fits.converged.all())
    for latent in z.amax(0).argsort(descending=True)[:40].tolist():
        _, _, loss = sklearn_fit(z[:, latent].double().numpy(), y.numpy(), 1e-6)
        assert abs(fits.losses[latent] - loss) < 1e-8


@pytest.mark.parametrize("ridge", [1e-2, 1e-6, 1e-9])
def test_latents_that_separate_are_done_in_a_few_steps(ridge):
    """1 - σ(10) has lost four digits, and softplus(l) - l all of them: Newton never stood still."""
    g = draw(0)
    y = torch.rand(400, generator=g) < 0.3
    u = torch.rand(400, generator=g)
    z = torch.stack([~y * 3.0, y * 3.0, ~y * u, y * u, y * 1e4, 2.0 - y.float()], 1)
    fits = fit_latents(Columns.from_code(SparseCode.from_dense(z)), y, ridge=ridge, max_steps=60)
    assert bool(fits.converged.all()), fits.converged


def test_a_latent_on_every_negative_converges():
    torch.manual_seed(0)
    y = torch.rand(400) < 0.3
    fits = fit_latents(Columns.from_code(SparseCode.from_dense((~y)[:, None] * 3.0)), y)
    assert fits.converged.tolist() == [True]


def test_blocks_and_units_do_not_change_the_fit():
    code, y = some_code(), some_labels()
    whole = fit_latents(Columns.from_code(code), y)
    parts = fit_latents(Columns.from_code(code), y, block=500)
    torch.testing.assert_close(whole.losses, parts.losses, rtol=0, atol=1e-13)
    louder = SparseCode(code.indices, code.values * 1024, LATENTS)
    scaled = fit_latents(Columns.from_code(louder), y)
    torch.testing.assert_close(whole.losses, scaled.losses, rtol=0, atol=1e-13)
    torch.testing.assert_close(whole.weights, scaled.weights * 1024, rtol=1e-9, atol=0)


def test_steps_that_run_out_are_said_to_have_run_out():
    code, y = some_code(), some_labels()
    fits = fit_latents(Columns.from_code(code), y, max_steps=2)
    assert not bool(fits.converged.all())


def test_columns_are_the_transposed_code():
    code = some_code()
    columns = Columns.from_code(code)
    dense = code.to_dense().double()
    assert torch.equal(columns.dense(range(LATENTS)), dense)
    kept = torch.rand(N, generator=draw(5)) < 0.5
    assert torch.equal(columns.select(kept).dense(range(LATENTS)), dense[kept])


def test_what_cannot_be_fitted_is_refused():
    columns, y = Columns.from_code(some_code()), some_labels()
    with pytest.raises(ValueError, match="0 of 300 examples are positive"):
        fit_latents(columns, torch.zeros(N, dtype=torch.bool))
    with pytest.raises(ValueError, match="300 of 300"):
        fit_latents(columns, torch.ones(N, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected torch.bool \[300\]"):
        fit_latents(columns, y[:-1])
    with pytest.raises(ValueError, match="ridge is 0"):
        fit_latents(columns, y, ridge=0.0)
    bad = SparseCode(torch.zeros(4, 1, dtype=torch.int64), torch.full((4, 1), math.nan), 3)
    with pytest.raises(ValueError, match="NaN"):
        Columns.from_code(bad)
    twice = SparseCode(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2), 3)
    with pytest.raises(ValueError, match="names a latent twice"):
        Columns.from_code(twice)
    with pytest.raises(ValueError, match="pool the tokens"):
        Columns.from_code(SparseCode.from_dense(torch.rand(2, 3, 4)))


# -- scores --------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn():
    logits = torch.randn(200, generator=draw(2)).mul(2).round()  # with ties
    y = torch.rand(200, generator=draw(3)) < 0.4
    found = scores(logits, y)
    assert found.auc == pytest.approx(roc_auc_score(y, logits), abs=1e-12)
    assert found.f1 == pytest.approx(f1_score(y, logits > 0), abs=1e-12)
    assert found.loss == pytest.approx(log_loss(y, logits.double().sigmoid()), abs=1e-9)
    assert found.accuracy == pytest.approx(float(((logits > 0) == y).double().mean()))
    assert math.isnan(scores(logits, torch.ones(200, dtype=torch.bool)).auc)
    assert scores(-torch.ones(5), torch.zeros(5, dtype=torch.bool)).f1 == 0


def planted(n=400):
    """Latent 7 says the label with a few mistakes; a dozen others are noise."""
    g = draw(4)
    labels = torch.rand(n, generator=g) < 0.4
    dense = (torch.rand(n, 12, generator=g) < 0.3) * torch.rand(n, 12, generator=g)
    dense[:, 7] = (labels ^ (torch.rand(n, generator=g) < 0.05)) * 3.0
    return SparseCode.from_dense(dense), labels


def test_the_planted_latent_is_found_and_scored_on_the_test_split():
    code, labels = planted()
    train = stratified([str(bool(y)) for y in labels], 0.25, 3)
    (probe,) = sparse_probe(code, labels, train=train, ks=(1, 3), dense=code.to_dense())
    assert probe.latent == 7 and (probe.train, probe.test) == (
        int(train.sum()),
        int((~train).sum()),
    )
    z = code.to_dense()[:, 7].double().numpy()
    y = labels.numpy()
    held = (~train).numpy()
    w, b, loss = sklearn_fit(z[train.numpy()], y[train.numpy()], 1e-6)
    assert probe.score == pytest.approx(loss, abs=1e-9)
    logit = w * z[held] + b
    assert probe.scores.accuracy == pytest.approx(((logit > 0) == y[held]).mean())
    assert probe.scores.auc == pytest.approx(roc_auc_score(y[held], logit))
    assert probe.majority == pytest.approx((~y[held]).mean())
    p = y[train.numpy()].mean()
    assert probe.entropy == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p))
    assert probe.k_sparse[1].accuracy == pytest.approx(probe.scores.accuracy)
    fit = LogisticRegression(max_iter=1000)
    x = code.to_dense().double()
    x = ((x - x[train].mean(0)) / x[train].std(0, correction=0)).numpy()
    fit.fit(x[train.numpy()], y[train.numpy()])
    assert probe.dense.accuracy == pytest.approx(fit.score(x[held], y[held]))
    assert probe.fits.losses.argmin() == 7 and probe.unconverged == 0


def test_mean_difference_ranks_by_the_difference_of_class_means():
    code, labels = planted()
    dense = code.to_dense() * torch.logspace(0, 2, 12)  # the noise of latent 11 is the loudest
    code = SparseCode.from_dense(dense)
    (probe,) = sparse_probe(code, labels, ks=(1,), select="mean_difference")
    train = stratified([str(bool(y)) for y in labels], 0.2, 0)
    means = [dense[train & side].double().mean(0) for side in (labels, ~labels)]
    top = int((means[0] - means[1]).abs().argmax())
    (alone,) = sparse_probe(SparseCode.from_dense(dense[:, top : top + 1]), labels, ks=(1,))
    assert probe.k_sparse[1].accuracy == alone.k_sparse[1].accuracy


def test_labels_have_one_spelling_and_their_own_order():
    assert [as_text(x) for x in ("1", 1, 1.0, "1.0", " 1 ", np.float32(1), "1.")] == ["1"] * 7
    assert [as_text(x) for x in ("true", True, "TRUE", np.True_)] == ["True"] * 4
    assert [as_text(x) for x in ("0.50", 0.5, "01", "1e3", "a.0", "100")] == [
        "0.5", "0.5", "01", "1e3", "a.0", "100",
    ]  # fmt: skip
    for nothing in ("", "  ", None, math.nan):
        with pytest.raises(ValueError, match="a label is"):
            as_text(nothing)
    assert list(binary_tasks(["10", "9", "-2", "9.5"])) == ["-2", "9", "9.5", "10"]
    assert list(binary_tasks(["9", "10"])) == ["10"]  # the later of two
    assert list(binary_tasks(["10", "9", "nan"])) == ["10", "9", "nan"]
    assert list(binary_tasks(["10", "9", "8"], [9.0, "10"])) == ["9+10"]
    code, labels = planted()
    mixed = [
        ("1.0" if i % 2 else 1) if y else ("0" if i % 2 else 0.0) for i, y in enumerate(labels)
    ]
    assert sparse_probe(code, mixed) == sparse_probe(code, labels.long())
    with pytest.raises(ValueError, match="probe task: a label is ''"):
        sparse_probe(code, ["", *mixed[1:]])


def test_a_class_without_training_examples_is_left_out_and_named():
    code, labels = planted()
    train = stratified([str(bool(y)) for y in labels], 0.25, 3)
    names = ["dog" if y else "cat" for y in labels]
    names[int((~train).nonzero()[0])] = "[/w]"
    found = sparse_probe(code, names, train=train, name="pets")
    assert [probe.positive for probe in found] == ["cat", "dog"]
    assert found.left_out == ("pets: [/w]",)
    assert "left out, one class only in the train split: pets: [/w]" in str(found)
    assert "left out" not in str(sparse_probe(code, labels))
    with pytest.raises(ValueError, match=r"train split 0 are \[/w\]; both classes"):
        sparse_probe(code, names, train=train, positive="[/w]")
    one = torch.tensor([name == "dog" for name in names])
    with pytest.raises(ValueError, match="probe task: .*train split .*both classes are needed"):
        sparse_probe(code, names, train=one)  # not one of three is left


def test_names_that_look_like_markup_are_printed_as_they_are():
    code, labels = planted()
    names = ["[/w]" if y else "[inst]" for y in labels]
    probes = sparse_probe(code, names, name="[bold]:dog:")
    console = Console(width=300)
    with console.capture() as shown:
        console.print(_cli_probe._table("a[/b]", probes))
    assert all(name in shown.get() for name in ("[bold]:dog:", "[inst]", "a[/b]: mean score"))


def test_compared_sources_that_look_like_markup_are_printed_as_they_are():
    row = {name: 1 for name in ("small", "large", "found", "split", "new")}
    row |= {"small_source": "x[/w]", "large_source": "y[inst]", "mean_children": 1.0}
    pair = SimpleNamespace(
        a="x[/w]", b="y[inst]", pw_mcc=1.0, same_counterpart=None, shared=None,
        shared_notebook=None, histogram=lambda: [1] * 10,
        decoder=SimpleNamespace(bound=1.0, nearest=torch.ones(1)),
    )  # fmt: skip
    found = SimpleNamespace(pairs=[pair], pw_mcc=1.0, threshold=0.7)
    console = Console(width=300)
    for shown in (
        _cli_compare._table(found),
        _cli_compare._splitting([row | {"max_children": 1}]),
        _cli_compare._bars(pair),
    ):
        with console.capture() as said:
            console.print(shown)
        assert "x[/w]" in said.get() and "y[inst]" in said.get()


def test_classes_become_binary_tasks():
    tasks = binary_tasks(["a", "b", "c", "a"])
    assert list(tasks) == ["a", "b", "c"] and tasks["a"].tolist() == [True, False, False, True]
    assert list(binary_tasks(["0", "1"])) == ["1"]
    assert binary_tasks(["a", "b", "c"], ["a", "c"])["a+c"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="no example is labelled"):
        binary_tasks(["a", "b"], "d")
    with pytest.raises(ValueError, match="two classes are needed"):
        binary_tasks(["a", "a"])


def test_the_split_keeps_proportions_and_depends_on_the_seed_alone():
    labels = ["a"] * 80 + ["b"] * 20 + ["c"] * 2 + ["d"]
    train = stratified(labels, 0.25, 1)
    assert torch.equal(train, stratified(labels, 0.25, 1))
    assert not torch.equal(train, stratified(labels, 0.25, 2))
    held = [label for label, t in zip(labels, train.tolist(), strict=True) if not t]
    assert [held.count(label) for label in "abcd"] == [20, 5, 1, 0]


def test_a_table_survives_a_file(tmp_path):
    code, labels = planted()
    probes = sparse_probe(code, labels, ks=(2,), name="planted")
    assert "planted" in str(probes) and "acc. k=2" in str(probes) and len(probes) == 1
    frame = probes.to_pandas()
    assert frame.latent[0] == 7 and frame.k2_accuracy[0] == probes[0].k_sparse[2].accuracy
    assert probes.save(tmp_path / "t.csv").read_text().startswith("task,positive")
    probes.save(tmp_path / "t.json")
    (read,) = json.loads((tmp_path / "t.json").read_text())
    assert Probe.from_dict(read) == probes[0]
    assert Probes(probes.probes * 2).mean_score == pytest.approx(probes[0].score)
    with pytest.raises(ValueError, match="neither .json nor .csv"):
        probes.save(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ks": (0,)}, "expected between 1 and 12"),
        ({"select": "luck"}, "expected one of loss, mean_difference"),
        ({"train": torch.ones(400, dtype=torch.bool)}, "no example is left"),
        ({"train": torch.ones(4)}, r"expected torch.bool \[400\]"),
        ({"dense": torch.ones(3, 2)}, r"expected \[400, d\]"),
        ({"test_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    code, labels = planted()
    with pytest.raises(ValueError, match=says):
        sparse_probe(code, labels, **options)
    with pytest.raises(ValueError, match="399 labels for 400"):
        sparse_probe(code, labels[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["probing.py --quick", "matching.py --sizes 64"])
def test_the_benchmarks_run(script):
    root = Path(__file__).parents[1]
    name, *options = script.split()
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / name), *options],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "green" in done.stdout or '"same_partner": 1.0' in done.stdout
