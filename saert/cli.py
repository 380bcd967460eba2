"""The command line: `saert demo`, `generate`, `features`, `info`, `train`, `scale`, `eval`,
`explain`, `index`, `card`, `probe`, `compare`, `publish`,
`refine`, `verify`, `app`, `serve`.

Commands read options, call `_cli_run`, and print: tables for people, or one JSON object with
`--json` and nothing else on standard output. What the user can put right is one line on standard
error and exit code 2; `SAERT_DEBUG=1` shows where it was raised.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

import saert._cli_ablate as ablating
import saert._cli_app as serving
import saert._cli_compare as comparing
import saert._cli_eval as evaluation
import saert._cli_explain as explaining
import saert._cli_find as finding
import saert._cli_index as indexing
import saert._cli_probe as probing
import saert._cli_publish as publishing
import saert._cli_refine as refining
import saert._cli_run as run
import saert._cli_serve as openai_serving
import saert._cli_train as training
import saert._cli_verify as verifying
import saert._cli_view as view
from saert._cli_edits import latent_of, read_edits
from saert._cli_io import print_json, user_errors
from saert._cli_options import At, Device, Json, Model, Sae, Strict
from saert.hub import bundled
from saert.hub.session import BUNDLED, Loaded, Session, load_model, load_sae, open_session
from saert.runtime import attach

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Sparse autoencoders on live transformers: look at latents, steer them, take them out.",
    epilog="Without --model and --sae everything runs on the bundled model, offline.",
)

VERBS = ("steered", "ablated")


def examples(*lines: str) -> str:
    """An epilog with a line for each; Typer joins lines that no blank line separates."""
    return "\n\n".join(("Examples:", *(f"  {line}" for line in lines)))


class Phase(StrEnum):
    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"


Prompt = Annotated[str, typer.Argument(help="The text to continue or to look at.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", min=1, help="How many tokens to generate.")]
Seed = Annotated[int, typer.Option("--seed", help="The same draws for every run; see --sample.")]
Sample = Annotated[
    bool, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.01, help="Of --sample; lower is safer.")
]


def edit_option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=f"{text} May be repeated.")


@app.command(
    epilog=examples(
        "saert demo",
        "saert demo --steer 17:8 --ablate 5 --prompt 'The dog'",
        "saert demo --json --tokens 20",
    )
)
def demo(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to continue.")
    ] = bundled.DEMO.prompt,
    steer: Annotated[
        str | None,
        typer.Option(metavar="LATENT:AMOUNT", help="What to add. Default: picked for the prompt."),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(metavar="LATENT", help="What to silence. Default: picked for the prompt."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Latents to show per token.")] = 3,
    tokens: Tokens = 40,
    seed: Seed = 0,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    model: Model = None,
    sae: Sae = None,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """A tour: active latents, a steered and an ablated continuation, and what attaching costs."""
    with user_errors():
        session = open_session(model, sae or [], hookpoint=hookpoint, device=device, strict=strict)
        how = run.Sampling(tokens, seed, sample, temperature)
        found = run.read_features(session, prompt, top)
        first = run.suggest(session.saes[0], found[0])
        steered = read_edits(session, add_=[steer or _where(session, first.steer)])
        ablated = read_edits(session, ablate_=[ablate or _where(session, first.ablate)])
        baseline = run.continue_prompt(session, prompt, how)
        edited = [run.continue_prompt(session, prompt, how, edits) for edits in (steered, ablated)]
        cost = run.measure_overhead(session, prompt, how)
    if as_json:
        answer = about(session, prompt, how)
        answer["features"] = [one.as_json() for one in found]
        answer["baseline"] = baseline.as_json()
        for name, edits, one in zip(VERBS, (steered, ablated), edited, strict=True):
            answer[name] = {"edit": run.describe_edit(edits[0], session)} | one.as_json()
        answer["overhead"] = cost.as_json()
        print_json(answer)
        return
    titles = [
        _title(verb, edits[0], session)
        for verb, edits in zip(VERBS, (steered, ablated), strict=True)
    ]
    console = Console()
    for features_of in found:
        console.print(view.features_table(features_of))
    view.side_by_side(console, {"baseline": baseline, **dict(zip(titles, edited, strict=True))})
    console.print(view.report_lines(edited[0].report))
    console.print(view.overhead_line(cost))


@app.command(
    epilog=examples(
        "saert generate 'The dog' --add 17:8 --phase generated",
        "saert generate 'The dog' --ablate 17,18 --positions 2:6",
        "saert generate 'The dog' -m gpt2 -s USER/SAES:resid_post.8 --add 3:40",
    )
)
def generate(
    prompt: Prompt,
    add: Annotated[
        list[str] | None, edit_option("--add", "LATENT:AMOUNT", "Steer: f + amount.")
    ] = None,
    clamp: Annotated[
        list[str] | None, edit_option("--clamp", "LATENT:VALUE", "Set: f = value.")
    ] = None,
    scale: Annotated[
        list[str] | None, edit_option("--scale", "LATENT:FACTOR", "Multiply: factor · f.")
    ] = None,
    ablate: Annotated[
        list[str] | None, edit_option("--ablate", "LATENT[,…][:TO]", "Silence: f = 0, or TO.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="POSITIONS",
            help="Edit only there: 3, 0,4 or 2:10; negative from the end of the prompt.",
        ),
    ] = None,
    phase: Annotated[Phase, typer.Option(help="Edit prompt, continuation or all.")] = Phase.ALL,
    splice: Annotated[
        bool,
        typer.Option("--splice", help="Use the reconstruction: drop the SAE's error."),
    ] = False,
    tokens: Tokens = 40,
    seed: Seed = 0,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    model: Model = None,
    sae: Sae = None,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt without and with edits, and show what they changed.

    Edits apply in the order add, clamp, scale, ablate. With several SAEs, write HOOKPOINT/LATENT.
    """
    with user_errors():
        session = open_session(model, sae or [], hookpoint=hookpoint, device=device, strict=strict)
        how = run.Sampling(tokens, seed, sample, temperature)
        edits = read_edits(
            session,
            add_=add or [],
            clamp_=clamp or [],
            scale_=scale or [],
            ablate_=ablate or [],
            positions=positions,
            phase=phase.value,
        )
        baseline = run.continue_prompt(session, prompt, how)
        edited = run.continue_prompt(session, prompt, how, edits, splice=splice)
    if as_json:
        print_json(
            about(session, prompt, how)
            | {
                "edits": [run.describe_edit(edit, session) for edit in edits],
                "splice": splice,
                "baseline": baseline.as_json(),
                "edited": edited.as_json(),
            }
        )
        return
    console = Console()
    title = "spliced" if splice and not edits else "edited" if edits else "observed"
    runs = {"baseline": baseline, title: edited}
    view.side_by_side(console, runs)
    console.print(view.change_table(runs))
    console.print(view.report_lines(edited.report))


@app.command(
    epilog=examples(
        "saert features 'The dog' --top 4",
        "saert features 'The dog' --latent 17 --latent 18",
    )
)
def features(
    prompt: Prompt,
    top: Annotated[int, typer.Option(min=1, help="Latents to show per token.")] = 8,
    latent: Annotated[
        list[str] | None,
        typer.Option(metavar="LATENT", help="Trace this latent over the prompt. May be repeated."),
    ] = None,
    model: Model = None,
    sae: Sae = None,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """The active latents at every token of a prompt, strongest first."""
    with user_errors():
        session = open_session(model, sae or [], hookpoint=hookpoint, device=device, strict=strict)
        trace = [latent_of(session, spec, "--latent") for spec in latent or []]
        found = run.read_features(session, prompt, top, trace)
    if as_json:
        print_json(about(session, prompt) | {"features": [one.as_json() for one in found]})
        return
    console = Console()
    for loaded, one in zip(session.saes, found, strict=True):
        for number in one.traced:
            console.print(view.traced_text(one, number, loaded.label(number)))
        if not trace:
            console.print(view.features_table(one))
        console.print(view.report_lines({one.hookpoint: one.report}))


app.command(
    "app",
    epilog=examples(
        "saert app --open",
        "saert app -m gpt2 -s gpt2:openai-32k/resid_post.6 --features index --port 8000",
    ),
)(serving.app_command)

app.command(
    "serve",
    epilog=examples(
        "saert serve",
        "SAERT_API_KEY=… saert serve -m gpt2 -s gpt2:openai-32k/resid_post.6 --host 0.0.0.0",
    ),
)(openai_serving.serve_command)

app.command(
    "find", epilog=examples("saert find gpt2", "saert find google/gemma-2-2b --offline --json")
)(finding.find_command)

app.command(
    epilog=examples(
        "saert train bundled --data stories.jsonl --hookpoints resid_post.2 --tokens 1e6 -k 16",
        "saert train --recipe gpt2-small --hookpoints resid_post.6,resid_post.8",
        "saert train gpt2 --data 'text/*.parquet' --hookpoints 'mlp_in.6->mlp_out.6'",
        "saert train … --objective jumprelu --set objective.target_l0=40 --set optimiser.ema=0.999",
        "torchrun --nproc-per-node 8 --no-python saert train --recipe llama-3.1-8b --shards 4",
    )
)(training.train)

app.command(
    epilog=examples(
        "saert scale bundled --data stories.jsonl --hookpoint resid_post.2 --tokens 5e5",
        "saert scale gpt2 --recipe gpt2-small --num-latents 2048,8192,32768 -k 16,32,64",
    )
)(training.scale)

app.command(
    epilog=examples(
        "saert ablate --prompt 'Once upon a time there was a dog' --positions -1",
        "saert ablate bundled:resid_post.2 --rows 8 --latents attributed:50 --channels 32",
        "saert ablate USER/SAES:resid_post.8 -m gpt2 --data 'text/*.txt' --out effects",
    )
)(ablating.ablate)

app.command(
    epilog=examples(
        "saert explain bundled:resid_post.2 --latent 71 --latent 546",
        "saert explain --latents 100 --data stories.jsonl --rows 512 --out n2g.jsonl",
        "saert explain --latents all --data stories.jsonl --out n2g.jsonl --reconstruction",
    )
)(explaining.explain)

app.command(
    epilog=examples(
        "saert index bundled:resid_post.2 --data stories.jsonl --rows 20000",
        "saert index USER/SAES:resid_post.8 -m gpt2 --data 'text/*.parquet' --export neuronpedia",
    )
)(indexing.index)

app.command(epilog=examples("saert card features 71 546", "saert card features --text park"))(
    indexing.card
)

app.command(
    epilog=examples(
        "saert refine bundled:resid_post.2 --data stories.jsonl",
        "saert refine USER/SAES:resid_post.8 -m gpt2 --data 'text/*.txt' --rows 200 --json",
    )
)(refining.refine)

app.command(
    "eval",
    epilog=examples(
        "saert eval",
        "saert eval bundled:resid_post.2 --data stories.jsonl --rows 200",
        "saert eval USER/SAES:resid_post.8 -m gpt2 --data 'text/*.parquet' --context 1024",
        "saert eval USER/SAES:L15 -m BASE --tuned BASE-instruct --data chats.jsonl",
    ),
)(evaluation.evaluate)

app.command(
    epilog=examples(
        "saert probe suite.toml",
        "saert probe suite.toml --data FOLDER --sae bundled:resid_post.2 --out probes",
        "saert probe suite.toml -m gpt2 -s USER/SAES:resid_post.8 --k 1,5,20 --json",
    )
)(probing.probe)

app.command(
    epilog=examples(
        "saert compare bundled:resid_post.1 bundled:resid_post.2",
        "saert compare runs/seed0/saes:resid_post.6 runs/seed1/saes:resid_post.6",
    )
)(comparing.compare)

app.command(
    epilog=examples(
        "saert verify bundled:resid_post.2",
        "saert verify USER/SAES:resid_post.8 -m gpt2 --data 'text/*.txt' --expect l0=64",
    )
)(verifying.verify)

app.command(
    epilog=examples(
        "saert publish runs/gpt2 USER/gpt2-saes --dry-run",
        "saert publish runs/gpt2 USER/gpt2-saes --private --tag v1.0 --license apache-2.0",
        "saert publish runs/gpt2 USER/gpt2-saes-sparsify --format sparsify",
    )
)(publishing.publish)


@app.command(
    epilog=examples(
        "saert info",
        "saert info bundled:resid_post.2",
        "saert info ./my-saes/one --model ./my-model",
    )
)
def info(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="SAEs to describe. None: what is bundled."),
    ] = None,
    model: Model = None,
    sae: Sae = None,
    as_json: Json = False,
) -> None:
    """What an SAE is: shapes, activation, hookpoint, metrics. With --model: does it fit?"""
    with user_errors():
        chosen = [*(sources or []), *(sae or [])]
        overview = not chosen
        if overview:
            chosen = [f"{BUNDLED}:{path}" for path in bundled.HOOKPOINTS]
        loaded = [load_sae(source) for source in chosen]
        network = load_model(model or BUNDLED)[0] if model or overview else None
        facts = [run.describe_sae(one) for one in loaded]
        if model:
            facts = [fact | fit(network, one) for fact, one in zip(facts, loaded, strict=True)]
        about_model = None if network is None else run.describe_model(model or BUNDLED, network)
    if as_json:
        print_json({"model": about_model, "saes": facts})
        return
    console = Console()
    if about_model is not None:
        console.print(view.info_table(about_model))
    if overview:
        console.print(view.overview_table(facts))
        return
    for fact in facts:
        console.print(view.info_table(fact))


def fit(model: Any, loaded: Loaded) -> dict[str, Any]:
    """Whether an SAE can be attached to a model: where, or why not."""
    try:
        with attach(model, loaded.sae):
            return {"fits": True, "at": loaded.sae.hookpoint.resolve(model).path}  # type: ignore[union-attr]
    except ValueError as refusal:
        return {"fits": False, "why": str(refusal).replace("strict=False", "--no-strict")}


def about(session: Session, prompt: str, how: run.Sampling | None = None) -> dict[str, Any]:
    """What every JSON answer begins with."""
    facts: dict[str, Any] = {
        "model": session.name,
        "saes": [{"source": one.source, "hookpoint": one.name} for one in session.saes],
        "prompt": prompt,
    }
    return facts if how is None else facts | {"sampling": vars(how)}


def _where(session: Session, spec: str) -> str:
    return spec if len(session.saes) == 1 else f"{session.saes[0].name}/{spec}"


def _title(verb: str, edit: Any, session: Session) -> str:
    facts = run.describe_edit(edit, session)
    names = ", ".join(
        f"#{latent} {label}" if label else f"#{latent}"
        for latent, label in zip(facts["latents"], facts["labels"], strict=True)
    )
    return f"{verb} {names}" + (f" {facts['amount']:+g}" if facts["amount"] else "")
