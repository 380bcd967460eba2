"""Ablation effects by replay, beside batched full forward passes over the same ablations.

    python benchmarks/ablation.py --save
    python benchmarks/ablation.py --bundled --save   # what the effects are, not how long they take

A random model of GPT-2 small's shape (12 layers, d 768, vocabulary 50,257), a TopK SAE at
resid_post.8, horizon 16; for each length one row of tokens, and every active latent at evenly
spread positions. Full passes run whole rows, in batches as large as the same memory allows, change
one token with a hook, and measure with the same functions. They are timed at two of the positions,
as each costs the same, and both times are per ablation; the replay's has all of its preparation in
it. Every round times both, in turns first; the ratio is the median over rounds.
The largest difference in sparsity, over the ablations that both ran, has to stay within 1e-4.

`--bundled` compares the bundled model's latents with channels of the hidden state and random
directions at the same tokens of held-out text: how sparse and how large their effects are (the
table of docs/ablation.md).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

# This folder's kernels.py would hide Hugging Face's package `kernels`, which transformers imports.
sys.path[0] = str(Path(__file__).parents[1])

import torch  # noqa: E402
import transformers  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.kernels import quartiles  # noqa: E402
from benchmarks.train_quality import RESULTS, TEXT, write  # noqa: E402
from saert.activations import TopK  # noqa: E402
from saert.capture import capture  # noqa: E402
from saert.hooks import hooked  # noqa: E402
from saert.hub import bundled  # noqa: E402
from saert.measure.ablation.ablate import ablation_effects, direction_effects  # noqa: E402
from saert.measure.ablation.effects import effects  # noqa: E402
from saert.sae import SAE  # noqa: E402
from saert.train.rows import heldout_rows  # noqa: E402
from saert.train.text import DataConfig  # noqa: E402

TARGETS = {64: 5.0, 256: 15.0}
BOUNDS = {64: 7.8, 256: 31.0}
"""FLOP of whole passes over those of a replay."""
MEMORY = 2**29


@dataclass
class Row:
    """One length of row. `replay`, `full`: seconds per ablation; `ratio`: full / replay of the same
    round, median."""

    tokens: int
    ablations: int
    full_ablations: int
    replay: list[float]
    full: list[float]
    ratio: float
    worst_sparsity: float
    worst_kl: float


def full_passes(
    model: transformers.PreTrainedModel, sae: SAE, ids: Tensor, positions: list[int], horizon: int
) -> tuple[Tensor, Tensor]:
    """Sparsity and mean KL of every active latent at `positions`, in the order of the SAE's code
    within a position."""
    at = sae.hookpoint
    assert at is not None
    length, vocabulary = ids.shape[1], model.config.vocab_size
    size = max(1, MEMORY // (4 * vocabulary * (length + 3)))
    with torch.no_grad():
        x = capture(model, ids, [at])[at]
        plain = model(ids, use_cache=False).logits[0]
        code = sae.encode(x)
        found = []
        for position in positions:
            stop = min(position + horizon, length)
            following = torch.nn.functional.pad(ids[0], (0, 1), value=-1)[position + 1 : stop + 1]
            latents, values = code.indices[position], code.values[position]
            changes = -values[:, None] * sae.W_dec[latents]
            for change in changes.split(size):

                def act(hidden: Tensor, p: int = position, change: Tensor = change) -> Tensor:
                    hidden = hidden.clone()
                    hidden[:, p] += change
                    return hidden

                with hooked(model, at, act):
                    rows = ids.expand(len(change), -1)
                    logits = model(rows, use_cache=False).logits[:, position:stop]
                one = effects(plain[position:stop], logits, following, 10)
                found.append((one.sparsity, one.kl.mean(-1)))
    sparsity, kl = zip(*found, strict=True)
    return torch.cat(sparsity), torch.cat(kl)


def subject(layers: int, num_latents: int, k: int) -> tuple[transformers.PreTrainedModel, SAE]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    W = torch.nn.functional.normalize(torch.randn(num_latents, config.n_embd), dim=-1)
    return model, SAE.from_weights(
        W, W, activation=TopK(k), hookpoint=f"resid_post.{layers * 2 // 3}"
    )


def measure(
    model: transformers.PreTrainedModel, sae: SAE, tokens: int, places: int, rounds: int
) -> Row:
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    step = tokens / places
    positions = [int(step * (i + 0.5)) for i in range(places)]
    some = [positions[places // 4], positions[places * 3 // 4]]
    horizon = 16
    seen = {}

    def replay() -> None:
        seen["replay"] = ablation_effects(
            model, sae, ids, positions=positions, horizon=horizon, progress=False
        )

    def full() -> None:
        seen["full"] = full_passes(model, sae, ids, some, horizon)

    runs = {"replay": replay, "full": full}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):  # each takes half a minute or more: nothing needs warming up
        for name in sorted(runs, reverse=bool(turn % 2)):
            begun = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begun)
    whole, (sparsity, kl) = seen["replay"], seen["full"]
    ours = whole[torch.isin(whole.positions, torch.tensor(some))]
    replayed = [s / len(whole) for s in seconds["replay"]]
    full_passed = [s / len(ours) for s in seconds["full"]]
    return Row(
        tokens=tokens,
        ablations=len(whole),
        full_ablations=len(ours),
        replay=replayed,
        full=full_passed,
        ratio=statistics.median(f / r for f, r in zip(full_passed, replayed, strict=True)),
        worst_sparsity=(ours.sparsity - sparsity).abs().max().item(),
        worst_kl=((ours.kl - kl).abs() / kl).max().item(),
    )


@dataclass
class Kind:
    """All ablations of one kind at a hookpoint: means, sparsity also as a median."""

    hookpoint: str
    horizon: int
    kind: str
    count: int
    sparsity: float
    median_sparsity: float
    kl: float
    loss_change: float


def bundled_kinds(text: Path, rows: int, context: int) -> Iterator[Kind]:
    """Latents with and without the SAE's error, channels and random directions, every 8th token."""
    model, tokenizer = bundled.model(), bundled.tokenizer()
    config = DataConfig((str(text),), context=context, holdout=0.02)
    ids = heldout_rows(config, tokenizer, rows)
    positions = list(range(4, context - 16, 8))
    for hookpoint in bundled.HOOKPOINTS:
        sae = bundled.sae(hookpoint)
        site = sae.target_hookpoint or sae.hookpoint
        assert site is not None
        for horizon in (16, 1):
            latents = partial(
                ablation_effects, model, sae, ids, positions=positions, horizon=horizon
            )
            directions = partial(
                direction_effects, model, site, ids, positions=positions, horizon=horizon
            )
            found = {
                "latents": latents(),
                "latents, no error": latents(keep_error=False),
                "channels": directions(directions="channels"),
                "random directions": directions(directions="random:64"),
            }
            for kind, table in found.items():
                facts = table.summary()
                yield Kind(
                    hookpoint, horizon, kind, len(table), facts["sparsity"],
                    table.sparsity.nanmedian().item(), facts["kl"], facts["loss_change"],
                )  # fmt: skip


def main(
    tokens: Annotated[str, typer.Option(help="Row lengths.")] = "64,256",
    places: Annotated[int, typer.Option(help="Positions per row.", min=4)] = 16,
    rounds: Annotated[int, typer.Option(min=2)] = 2,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    latents: Annotated[int, typer.Option(min=1)] = 32_768,
    k: Annotated[int, typer.Option(min=1)] = 32,
    of_bundled: Annotated[
        bool, typer.Option("--bundled", help="Compare kinds of ablations on the bundled model.")
    ] = False,
    text: Annotated[Path, typer.Option(help="For --bundled.")] = TEXT,
    rows_of_text: Annotated[int, typer.Option("--rows", help="For --bundled.", min=1)] = 16,
    save: Annotated[bool, typer.Option("--save", help="Write the raw figures as JSON.")] = False,
    results: Annotated[Path, typer.Option(help="The folder that --save writes to.")] = RESULTS,
) -> None:
    """Time ablation effects by replay and by full passes, and compare what they find."""
    if of_bundled:
        kinds = list(bundled_kinds(text, rows_of_text, 64))
        for one in kinds:
            print(
                f"{one.hookpoint:13} horizon {one.horizon:2}  {one.kind:18} {one.count:6} ablations"
                f"  sparsity {one.sparsity:.1%} (median {one.median_sparsity:.1%})"
                f"  KL {one.kl:.4f}  loss {one.loss_change:+.4f}"
            )
        if save:
            settings = {"rows": rows_of_text, "context": 64, "text": text.name}
            print(f"written to {write(results, 'ablation-bundled', kinds, settings=settings)}")
        return
    model, sae = subject(layers, latents, k)
    rows = []
    for length in (int(n) for n in tokens.split(",")):
        row = measure(model, sae, length, places, rounds)
        rows.append(row)
        ratios = [f / r for f, r in zip(row.full, row.replay, strict=True)]
        low, high = quartiles(ratios)
        goal = f", target {TARGETS[length]:g}×, FLOP bound {BOUNDS[length]:g}×" * (
            length in TARGETS
        )
        replay, full = (1000 * statistics.median(times) for times in (row.replay, row.full))
        Console(width=160).print(
            f"{length} tokens, {row.ablations} ablations: replay {replay:.0f} ms each, full passes "
            f"{full:.0f} ms, {row.ratio:.1f}× ({low:.1f} to {high:.1f}{goal}); largest difference: "
            f"sparsity {row.worst_sparsity:.1e}, KL {row.worst_kl:.1e} relative",
            highlight=False,
        )
    if save:
        settings = {"layers": layers, "latents": latents, "k": k, "places": places}
        print(f"written to {write(results, 'ablation', rows, rounds=rounds, settings=settings)}")
    if max(row.worst_sparsity for row in rows) > 1e-4:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
