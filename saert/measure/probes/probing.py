"""What single latents, a few latents and the hidden state know about a label.

The score of a task is that of Gao et al. 2024 (section 4.2): the lowest mean binary cross-entropy
that a logistic probe on one latent reaches, min_i min_{w,b} E[BCE(y, σ(w·z_i + b))]. The latent is
chosen on the train split; everything said about it is measured on the test split as well. Beside
it, optionally, k-sparse probes (Gurnee et al. 2023: choose k latents, then fit them together) and
a probe on the dense hidden state, so that a score can be judged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from saert.measure.probes.newton import Columns, LatentFits, fit_latents
from saert.measure.probes.results import Probe, Probes, Scores
from saert.measure.progress import tracked
from saert.sparse import SparseCode

Select = Literal["loss", "mean_difference"]
SELECT: tuple[Select, ...] = ("loss", "mean_difference")


def sparse_probe(
    code: SparseCode | Columns,
    labels: Tensor | Sequence[Any],
    *,
    train: Tensor | None = None,
    positive: Any | Iterable[Any] | None = None,
    ks: Sequence[int] = (),
    select: Select = "loss",
    dense: Tensor | None = None,
    ridge: float = 1e-6,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str = "task",
    progress: bool = False,
) -> Probes:
    """Find the latent that predicts a label best (Gao et al. 2024, section 4.2).

    Args:
        code: activations of N examples, [N, k] or latent by latent. Pool the tokens of a text
            first; `saert.measure.probe_suite` does both.
        labels: N labels of any kind. Two classes make one binary task, whose positive class is the
            later in order; more make one for each class, against all others.
        train: bool [N], the train split; the rest is the test split. None: drawn with `seed`, each
            class in proportion, `test_fraction` of it for the test.
        positive: the class or classes to make a single binary task of.
        ks: sizes of k-sparse probes: the k latents with the lowest single loss, or
            (`select="mean_difference"`) the largest difference of class means on the train split.
            Fitted with scikit-learn, with its default ridge, on latents scaled to mean square 1.
        dense: [N, d] hidden states, for a dense probe beside it (the same, standardised).
        ridge: of the single probes; see `saert.measure.probes.newton`.

    Of several tasks, those that the train split has one class of only are left out; `left_out` of
    the answer names them.

    Raises ValueError for labels that are empty or do not fit the examples, or a split without both
    classes in train or without test examples.
    """
    columns = code if isinstance(code, Columns) else Columns.from_code(code)
    try:
        names = [
            as_text(one) for one in (labels.tolist() if isinstance(labels, Tensor) else labels)
        ]
        train = stratified(names, test_fraction, seed) if train is None else train
        _check(columns, names, train, ks, select, dense)
        tasks, left_out = _fittable(binary_tasks(names, positive), train)
    except ValueError as error:
        raise ValueError(f"probe {name}: {error}") from None
    device = columns.values.device
    train = train.to(device)
    fitted, held = columns.select(train), columns.select(~train)
    hidden = None if dense is None else _standardised(dense.double().to(device), train)
    found = []
    for what, labelled in tracked(list(tasks.items()), f"probing {name}", progress):
        y, test = labelled.to(device)[train], labelled.to(device)[~train]
        fits = fit_latents(fitted, y, ridge=ridge)
        found.append(
            Probe(
                task=name,
                positive=what,
                train=len(y),
                test=len(test),
                **_single(fitted, held, y, test, fits),
                k_sparse=_several(fitted, held, y, test, _ranking(fitted, y, fits, select), ks),
                dense=None if hidden is None else _logistic(hidden, y, test, train),
            )
        )
    return Probes(tuple(found), tuple(f"{name}: {what}" for what in left_out))


def _fittable(tasks: dict[str, Tensor], train: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """The tasks that have both classes in the train split, and the names of the others."""
    positives = {what: int(labels[train.cpu()].sum()) for what, labels in tasks.items()}
    kept = {what: tasks[what] for what, n in positives.items() if 0 < n < int(train.sum())}
    if not kept:
        said = ", ".join(f"{n} are {what}" for what, n in positives.items())
        raise ValueError(
            f"of {int(train.sum())} examples in the train split {said}; both classes are needed"
        )
    return kept, [what for what in tasks if what not in kept]


def _single(
    fitted: Columns, held: Columns, y: Tensor, test: Tensor, fits: LatentFits
) -> dict[str, Any]:
    """What a `Probe` says about the best latent, and the base rate it competes with."""
    best = fits.best
    weight, bias = fits.weights[best], fits.biases[best]
    base = y.double().mean()
    majority = test if base > 0.5 else ~test
    return {
        "base_rate": float(base),
        "entropy": float(F.softplus(torch.logit(base)) - base * torch.logit(base)),
        "majority": float(majority.double().mean()),
        "latent": best,
        "weight": float(weight),
        "bias": float(bias),
        "score": float(fits.losses[best]),
        "scores": scores(weight * held.dense([best])[:, 0] + bias, test),
        "unconverged": int((~fits.converged).sum()),
        "fits": fits,
    }


def _several(
    fitted: Columns, held: Columns, y: Tensor, test: Tensor, ranked: Tensor, ks: Sequence[int]
) -> dict[int, Scores]:
    """{k: scores} of the first k of the ranked latents together."""
    if not ks:
        return {}
    chosen = ranked[: max(ks)].tolist()
    x = torch.cat((fitted.dense(chosen), held.dense(chosen)))
    train = torch.arange(len(x), device=x.device) < len(y)
    scale = x[train].square().mean(0).sqrt()
    x = x / scale.where(scale > 0, 1.0)
    return {k: _logistic(x[:, :k], y, test, train) for k in ks}


def _ranking(columns: Columns, y: Tensor, fits: LatentFits, select: Select) -> Tensor:
    """Latents, the most telling first."""
    if select == "loss":
        return fits.losses.argsort(stable=True)
    share = torch.where(y, 1 / y.sum(), -1 / (~y).sum()).double()
    difference = torch.zeros(columns.num_latents, dtype=torch.float64, device=y.device)
    difference.index_add_(0, columns.latents(), columns.values.double() * share[columns.rows])
    return difference.abs().argsort(descending=True, stable=True)


def _standardised(x: Tensor, train: Tensor) -> Tensor:
    mean, spread = x[train].mean(0), x[train].std(0, correction=0)
    return (x - mean) / spread.where(spread > 0, 1.0)


def _logistic(x: Tensor, y: Tensor, test: Tensor, train: Tensor) -> Scores:
    """scikit-learn's logistic regression with its defaults: fitted on train, scored on the rest."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError(
            "k-sparse and dense probes need scikit-learn: pip install 'saert[measure]'"
        ) from None
    fit = LogisticRegression(max_iter=1000).fit(x[train].cpu().numpy(), y.cpu().numpy())
    return scores(torch.from_numpy(fit.decision_function(x[~train].cpu().numpy())), test.cpu())


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Of logits [N] for labels bool [N]. F1 is 0 where nothing positive was found."""
    logits, y = logits.double(), labels.double()
    said = logits > 0
    hits = float((said & labels).sum())
    found = float(said.sum() + labels.sum())
    return Scores(
        loss=float(-F.logsigmoid((2 * y - 1) * logits).mean()),
        accuracy=float((said == labels).double().mean()),
        f1=2 * hits / found if found else 0.0,
        auc=_auc(logits, labels),
    )


def _auc(logits: Tensor, labels: Tensor) -> float:
    """The chance that a positive lies above a negative, ties half: Mann and Whitney 1947."""
    positives, negatives = float(labels.sum()), float((~labels).sum())
    if not positives or not negatives:
        return math.nan
    _, place, counts = logits.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    total = float(ranks[place][labels].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def binary_tasks(labels: Sequence[str], positive: Any = None) -> dict[str, Tensor]:
    """{what is positive: bool [N]}: see `sparse_probe`."""
    classes = _in_order(set(labels))
    if positive is not None:
        several = isinstance(positive, Iterable) and not isinstance(positive, str)
        wanted = {as_text(one) for one in (positive if several else [positive])}
        if unknown := wanted - set(classes):
            raise ValueError(f"no example is labelled {sorted(unknown)}; found {classes[:20]}")
        return {"+".join(_in_order(wanted)): torch.tensor([label in wanted for label in labels])}
    if len(classes) < 2:
        raise ValueError(f"every label is one of {classes}; two classes are needed")
    chosen = classes[1:] if len(classes) == 2 else classes
    return {one: torch.tensor([label == one for label in labels]) for one in chosen}


def stratified(labels: Sequence[str], test_fraction: float, seed: int) -> Tensor:
    """bool [N], true for train: of each class `test_fraction` is left out, at least one of each
    class that has two."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}, expected between 0 and 1")
    train = torch.ones(len(labels), dtype=torch.bool)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    members: dict[str, list[int]] = {}
    for at in order:
        members.setdefault(labels[at], []).append(at)
    for chosen in members.values():
        train[chosen[: min(max(1, round(test_fraction * len(chosen))), len(chosen) - 1)]] = False
    return train


def as_text(label: Any) -> str:
    """A label as a string, in one spelling; ValueError where it is empty, None or NaN."""
    text = spelled(label)
    if label is None or label != label or not text:
        raise ValueError(f"a label is {label!r}: an example without one belongs to no class")
    return text


def spelled(value: Any) -> str:
    """A value as a string that does not depend on whether CSV or JSON said it: "1", 1, "1.0" and
    1.0 are one, true and "True" too. Blanks around it are dropped; "01" and "1e3" stay."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return text.capitalize()
    if re.fullmatch(r"[+-]?\d+\.\d*", text):
        return text.rstrip("0").rstrip(".")
    return text


def _in_order(classes: Iterable[str]) -> list[str]:
    """By value where all are numbers (9 before 10), else by the alphabet."""
    try:
        value = {one: float(one) for one in classes}
    except ValueError:
        return sorted(classes)
    if not all(map(math.isfinite, value.values())):  # "nan" has no place among numbers
        return sorted(classes)
    return sorted(classes, key=lambda one: (value[one], one))


def _check(
    columns: Columns,
    names: Sequence[str],
    train: Tensor,
    ks: Sequence[int],
    select: str,
    dense: Tensor | None,
) -> None:
    n = columns.examples
    if len(names) != n:
        raise ValueError(f"{len(names)} labels for {n} examples")
    if train.dtype != torch.bool or train.shape != (n,):
        raise ValueError(f"train is {train.dtype} {list(train.shape)}, expected torch.bool [{n}]")
    if bool(train.all()):
        raise ValueError("no example is left for the test split")
    if any(not 0 < k <= columns.num_latents for k in ks):
        raise ValueError(f"ks are {list(ks)}, expected between 1 and {columns.num_latents}")
    if select not in SELECT:
        raise ValueError(f"select is {select!r}, expected one of {', '.join(SELECT)}")
    if dense is not None and (dense.dim() != 2 or len(dense) != n):
        raise ValueError(f"dense is {list(dense.shape)}, expected [{n}, d]")
