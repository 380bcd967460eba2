"""Options that several commands have, spelt once."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[
    str | None,
    typer.Argument(help="The SAE: a Hub id or folder, with :PATH inside it, or bundled:PATH."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A Hub id, a local folder, or 'bundled'.", metavar="MODEL"),
]
Sae = Annotated[
    list[str] | None,
    typer.Option(
        "--sae",
        "-s",
        help="A Hub id or folder, with :PATH inside it, or bundled:PATH. May be repeated.",
        metavar="SOURCE",
    ),
]
At = Annotated[
    str | None,
    typer.Option("--hookpoint", help="Where the SAE reads, if it does not say.", metavar="NAME"),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …, or auto.")]
Strict = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Refuse an SAE made for another model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="A Hub dataset, or .txt, .jsonl, .parquet or .npy files, globs, folders. Default: "
        "the model writes its own text.",
        metavar="SOURCE",
    ),
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of text.")]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", min=2, help="Tokens in a row. Default: 128, or what the model holds."
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows of one forward pass.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bars.")]
