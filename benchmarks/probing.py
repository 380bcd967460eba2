"""How fast all latents are probed, whether the fits are right, and what the bundled SAE scores.

    python benchmarks/probing.py --save                  # speed and exactness, synthetic codes
    python benchmarks/probing.py --data FOLDER --save    # benchmarks/probing.toml, docs/probes.md

The codes: 10,000 examples of 20 tokens, 32 draws a token from 32,768 latents with Zipf frequencies,
pooled by the maximum. Labels follow one latent, with
noise. Latents of a random sample are fitted by scikit-learn too, to the same ridge and a tight
tolerance: a difference above 1e-6 of a loss, or 1e-4 of a weight, is a red check, and no ratio is
printed. The ratio is (seconds of scikit-learn for one latent · latents that fire) / seconds for
all; scikit-learn runs with its defaults (lbfgs, tolerance 1e-4) there, and gets its column dense.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).parents[1])  # this folder's kernels.py would hide another package

import numpy as np  # noqa: E402
import sklearn  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from saert.hub import bundled  # noqa: E402
from saert.measure.probes.newton import Columns, fit_latents  # noqa: E402
from saert.measure.probes.suites import probe_suite, read_suite  # noqa: E402

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "probes.md"
BEGIN, END = "<!-- table: python benchmarks/probing.py -->", "<!-- end of table -->"
RIDGE = 1e-6


def main(
    data: Annotated[
        Path | None, typer.Option(help="The folder of benchmarks/probing.toml.")
    ] = None,
    examples: int = 10_000,
    tokens: int = 20,
    num_latents: int = 32_768,
    k: int = 32,
    sample: Annotated[int, typer.Option(help="Latents that scikit-learn fits.")] = 64,
    rounds: int = 3,
    threads: Annotated[int, typer.Option(help="0: as torch likes.")] = 0,
    quick: bool = False,
    save: bool = False,
) -> None:
    """Time and check the probes, or run the public suite on the bundled model."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        examples, num_latents, k, sample, rounds = 500, 256, 8, 16, 2
    found = _suite(data) if data is not None else _speed(
        *_codes(examples, tokens, num_latents, k), sample, rounds
    )  # fmt: skip
    if save:
        _save(found, "probing-suite" if data is not None else "probing", bool(data))
    if found.get("check") == "red":
        raise typer.Exit(1)


def _codes(
    examples: int, tokens: int, num_latents: int, k: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]:
    """Entries (example, latent, activation) with the matrix's size, and labels."""
    g = torch.Generator().manual_seed(0)
    reach = (1 / torch.arange(1, num_latents + 1).double()).cumsum(0)
    keys, values = [], []
    for first in range(0, examples, 1000):
        here = min(1000, examples - first)
        drawn = torch.rand(here, tokens * k, generator=g, dtype=torch.float64) * reach[-1]
        owner = torch.arange(first, first + here)[:, None]
        key, place = (owner * num_latents + torch.searchsorted(reach, drawn)).unique(
            return_inverse=True
        )
        height = -torch.rand(here, tokens * k, generator=g).log()
        value = torch.zeros(len(key)).scatter_reduce_(
            0, place.flatten(), height.flatten(), "amax", include_self=False
        )
        keys.append(key)
        values.append(value)
    key, value = torch.cat(keys), torch.cat(values)
    rows, latents = key // num_latents, key % num_latents
    teller = latents == 300 % num_latents
    fires = torch.zeros(examples).index_put_((rows[teller],), value[teller])
    logit = 2 * fires - 1.2
    y = torch.rand(examples, generator=g) < logit.sigmoid()
    return (rows, latents, value, examples, num_latents), y


def _speed(entries: Any, y: torch.Tensor, sample: int, rounds: int) -> dict[str, Any]:
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        columns = Columns.from_entries(*entries)
        fits = fit_latents(columns, y, ridge=RIDGE)
        seconds.append(time.perf_counter() - begun)
    active = columns.offsets.diff().nonzero().flatten()
    g = torch.Generator().manual_seed(1)
    chosen = active[torch.randperm(len(active), generator=g)[:sample]].tolist()
    labels, worst_loss, worst_weight, alone = y.numpy(), 0.0, 0.0, []
    for latent in chosen:
        z = columns.dense([latent])
        scale = float(z.square().mean().sqrt())
        x = (z / scale).numpy()
        tight = LogisticRegression(C=1 / (RIDGE * len(x)), solver="newton-cholesky", tol=1e-12)
        tight.set_params(max_iter=1000).fit(x, labels)
        w, b = tight.coef_[0, 0], tight.intercept_[0]
        logit = w * x[:, 0] + b
        loss = float((np.logaddexp(0, logit) - labels * logit).mean())
        worst_loss = max(worst_loss, abs(loss - float(fits.losses[latent])))
        ours = float(fits.weights[latent]) * scale
        worst_weight = max(worst_weight, abs(ours - w) / max(abs(w), 1e-3))
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lbfgs may stop early; that is its default
            LogisticRegression(C=1 / (RIDGE * len(x))).fit(x, labels)
        alone.append(time.perf_counter() - begun)
    green = worst_loss < 1e-6 and worst_weight < 1e-4 and bool(fits.converged.all())
    ours_s, each = statistics.median(seconds), statistics.median(alone)
    found = {
        "shape": {"examples": columns.examples, "latents": columns.num_latents,
                  "firing": len(active), "entries": len(columns.values)},
        "seconds": seconds, "median": ours_s, "sklearn_seconds_a_latent": alone,
        "worst_loss_difference": worst_loss, "worst_relative_weight_difference": worst_weight,
        "check": "green" if green else "red",
        "ratio": each * len(active) / ours_s if green else None,
    }  # fmt: skip
    print(
        f"{columns.num_latents:,} latents on {columns.examples:,} examples, "
        f"{len(columns.values):,} entries: {ours_s:.2f} s (of {rounds}: "
        f"{min(seconds):.2f} to {max(seconds):.2f}); scikit-learn {1e3 * each:.2f} ms a latent\n"
        f"largest difference on {len(chosen)} latents: loss {worst_loss:.1e}, weight "
        f"{worst_weight:.1e} (relative): "
        + (f"green, {found['ratio']:,.0f} times faster" if green else "CHECK RED")
    )
    return found


def _suite(data: Path) -> dict[str, Any]:
    model, tokenizer, sae = bundled.model(), bundled.tokenizer(), bundled.sae("resid_post.2")
    suite = read_suite(HERE / "probing.toml", data)
    begun = time.perf_counter()
    probes = probe_suite(model, tokenizer, sae, suite, ks=(5, 20), dense=True, progress=True)
    seconds = time.perf_counter() - begun
    print(probes)
    return {"seconds": seconds, "mean_score": probes.mean_score,
            "probes": [probe.as_dict() for probe in probes], "cells": probes.cells()}  # fmt: skip


def _save(found: dict[str, Any], name: str, page: bool) -> None:
    about = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/probing.py " + " ".join(
            Path(a).name if "/" in a else a for a in sys.argv[1:]
        ),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__},
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"{name}-{about['date']}-cpu-{torch.get_num_threads()}.json"
    head, *cells = found.pop("cells", [[]])
    path.write_text(json.dumps(about | found, indent=1) + "\n")
    if not page:
        return
    rows = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    rows += ["| " + " | ".join(row) + " |" for row in cells]
    note = (
        f"{about['date']}: resid_post.2 of the bundled model, 1,024 latents; losses in nats, mean "
        f"score {found['mean_score']:.4f}; {found['seconds']:.0f} s on {about['device']}. "
        f"Raw figures: [{path.name}](../benchmarks/results/{path.name})."
    )
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(rows) + "\n\n" + note + "\n" + after)


if __name__ == "__main__":
    typer.run(main)
