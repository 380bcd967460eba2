"""`python -m saert.train`: train from text files, with a recipe.

python -m saert.train bundled --text stories.txt --out my-bundle
torchrun --nproc-per-node 2 -m saert.train bundled --text stories.txt --out my-bundle
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from saert.train.bundle.config import BUNDLED_RECIPE, load_recipe
from saert.train.bundle.pipeline import Corpus, language_model_stage, sae_stage

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


class Stage(StrEnum):
    lm = "lm"
    saes = "saes"


@app.callback()
def main() -> None:
    """Train from text files, with a recipe. Under torchrun the processes share the work."""


@app.command()
def bundled(
    text: Annotated[
        list[Path],
        typer.Option(
            help="A .txt file, or .jsonl with a field `text`; repeat for more.", exists=True
        ),
    ],
    out: Annotated[Path, typer.Option(help="Gets model/ and saes/<hookpoint>/.")],
    recipe: Annotated[Path, typer.Option(help="The TOML recipe.", exists=True)] = BUNDLED_RECIPE,
    work: Annotated[Path, typer.Option(help="Checkpoints of the run under way.")] = Path(
        "runs/bundled"
    ),
    until: Annotated[Stage, typer.Option(help="The last stage to run.")] = Stage.saes,
    reference: Annotated[
        Path | None,
        typer.Option(help="A transformers model folder to compare bits per character with."),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads per process; 0: torch's choice.")] = 0,
) -> None:
    """Tokenizer, language model, SAEs, metrics and model cards. Run it again to continue."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    if threads:
        torch.set_num_threads(threads)
    loaded = load_recipe(recipe)
    corpus = Corpus.read(text, loaded)
    typer.echo(f"{len(corpus.train):,} training and {len(corpus.heldout):,} held-out segments")
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = language_model_stage(corpus, loaded, work, out, reference)
    if until == Stage.saes:
        sae_stage(model, tokenizer, corpus, loaded, work, out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    app()
