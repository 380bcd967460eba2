"""`saert serve`: an OpenAI-compatible server whose requests take edits of their own."""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from saert._cli_io import user_errors
from saert._cli_options import At, Device, Model, Sae, Strict
from saert.hub.session import Session, UserError, open_session

VLLM_FLAGS = {  # engine arguments of vLLM that are options here
    "model": "--model",
    "max_num_seqs": "--streams",
    "tensor_parallel_size": "--tensor-parallel",
    "enforce_eager": "--eager",
}
LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")


class EngineName(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


def serve_command(
    model: Model = None,
    sae: Sae = None,
    hookpoint: At = None,
    engine: Annotated[
        EngineName, typer.Option(help="What runs the model. vllm: see docs/serving.md.")
    ] = EngineName.transformers,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="vllm: GPUs (or, on a CPU, processes) that share the model.")
    ] = 1,
    eager: Annotated[bool, typer.Option("--eager", help="vllm: compile nothing.")] = False,
    engine_args: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='vllm: more of its engine arguments: \'{"dtype": "bfloat16", "max_model_len": '
            "8192}'.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Who may come: 0.0.0.0 lets other machines in; they need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SAERT_API_KEY",
            help="What clients must send; several with commas. Better in the environment than here,"
            " where `ps` shows it.",
        ),
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Let other machines in without a key.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: --model.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=4096, help="Answers at a time.")] = 64,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait for one.")] = 256,
    slots: Annotated[
        int, typer.Option(min=1, max=1024, help="Edits of one SAE that a request may have.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of one request.")] = 1_000_000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.")] = 600.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that answers get when the server is stopped.")
    ] = 30.0,
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Jinja, in place of the tokenizer's own."),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", exists=True, file_okay=False, help="What `saert index` wrote."
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Prompts and answers go into the log.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log /health and /metrics, too.")
    ] = False,
    device: Device = "auto",
    strict: Strict = True,
) -> None:
    """Serve a model with its SAEs to OpenAI clients; each request brings edits of its own.

    Without --model and --sae: the bundled model with all of its SAEs, offline.
    """
    with user_errors():
        limits, keys, run = _library()
        key = keys([part.strip() for part in (api_key or "").split(",") if part.strip()])
        from saert.engines.server.security import is_loopback

        if not key and not no_key and not is_loopback(host):
            raise UserError(
                f"--host {host} lets other machines in: set SAERT_API_KEY, or say --no-key"
            )
        start = run.on_transformers
        if engine is EngineName.vllm:
            options = _vllm_options(engine_args, tensor_parallel, eager, device)
            from saert.engines.server.vllm_start import engine_of, session_of

            session = session_of(*_named(model, sae), hookpoint=hookpoint, strict=strict)
            start = partial(engine_of, options=options)
        elif tensor_parallel > 1 or eager or engine_args is not None:
            raise UserError("--tensor-parallel, --eager and --engine-args are for --engine vllm")
        else:
            session = _session(*_named(model, sae), hookpoint, device, strict)
        template = None if chat_template is None else chat_template.read_text("utf-8")
        service = run.service_of(
            session,
            limits(
                streams=streams,
                waiting=waiting,
                max_tokens=max_tokens,
                body=max_body,
                seconds=timeout,
                grace=grace,
            ),
            name=name,
            slots=slots,
            template=template,
            indices={} if features is None else _indices(features, session),
            log_text=log_prompts,
            start=start,
        )
        typer.echo(f"http://{host}:{port}/v1 serves {service.name}", err=True)
        run.serve(service, key, host, port, logging.DEBUG if verbose else logging.INFO)


def _named(model: str | None, saes: list[str] | None) -> tuple[str | None, list[str]]:
    from saert.hub import bundled

    if model in (None, bundled.NAME) and not saes:
        saes = [f"{bundled.NAME}:{path}" for path in bundled.HOOKPOINTS]
    return model, saes or []


def _session(
    model: str | None, saes: list[str], hookpoint: str | None, device: str, strict: bool
) -> Session:
    session = open_session(model, saes, hookpoint=hookpoint, device=device, strict=strict)
    with session.attach(record=False):  # an SAE that was made for another model fails here
        return session


def _vllm_options(
    given: str | None, tensor_parallel: int, eager: bool, device: str
) -> dict[str, Any]:
    if find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vLLM is not installed here; in an environment of its own, "
            "pip install 'saert[serve,vllm]' (for a CPU: make setup-vllm)"
        )
    if device != "auto":
        raise UserError(f"--device {device}: vLLM takes the devices that it was built for")
    try:
        more = json.loads(given or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"--engine-args: not JSON ({error})") from None
    if not isinstance(more, dict):
        raise UserError(f"--engine-args: found {type(more).__name__}, expected a JSON object")
    if taken := VLLM_FLAGS.keys() & more:
        key = min(taken)
        raise UserError(f"--engine-args: {key}: use {VLLM_FLAGS[key]} instead")
    return {"tensor_parallel_size": tensor_parallel, "enforce_eager": eager} | more


def _indices(folder: Path, session: Session) -> dict[str, Any]:
    from saert.measure.features.index import FeatureIndex

    found = {}
    for one in session.saes:
        try:
            found[one.name] = FeatureIndex.open(folder, one.name)
        except FileNotFoundError:
            continue
    if not found:
        names = ", ".join(one.name for one in session.saes)
        raise UserError(f"--features {folder}: no index of {names}")
    return found


def _library() -> tuple[Any, Any, Any]:
    try:
        from saert.engines.server import run
        from saert.engines.server.limits import Limits
        from saert.engines.server.security import Keys
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LIBRARIES:
            raise
        raise UserError(f"saert serve needs {error.name}: pip install 'saert[serve]'") from None
    return Limits, Keys, run
