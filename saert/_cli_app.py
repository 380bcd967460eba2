"""`saert app`: steer, explore, ablate and refine in a browser."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saert._cli_io import user_errors
from saert._cli_options import Device, Model, Sae, Strict
from saert.hub.session import Session, UserError

if TYPE_CHECKING:
    from saert.demos.workbench import Loads


def app_command(
    model: Model = None,
    sae: Sae = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="What `saert index` wrote, for the latents' cards.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Who may come: 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Default: 7860, or the next that is free."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="A public address, through gradio's server.")
    ] = False,
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the address in a browser.")
    ] = False,
    any_sae: Annotated[
        bool | None,
        typer.Option(
            "--any-sae/--no-any-sae",
            help="Whether visitors may load other SAEs: from the Hub, up to 1 GB each; files and "
            "addresses only where nobody but this machine may come. Default: only there.",
        ),
    ] = None,
    device: Device = "auto",
    strict: Strict = True,
) -> None:
    """Steer, explore, ablate and refine a live model in a browser.

    Without --model and --sae: the bundled model with all of its SAEs, offline.
    """
    with user_errors():
        with _no_collection():
            launch, open_default = _app()
            session = open_default(model, sae or [], device=device, strict=strict)
        options = {"server_name": host, "server_port": port, "share": share, "inbrowser": open_}
        launch(session, features, _loads(host, share, any_sae), **options)


def _loads(host: str, share: bool, any_sae: bool | None) -> Loads:
    """Which SAEs visitors may load, given who may come and what was asked for."""
    alone = not share and _is_loopback(host)
    if any_sae is None:
        any_sae = alone
    if not any_sae:
        return "nothing"
    return "anything" if alone else "hub"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _app() -> tuple[Callable[..., None], Callable[..., Session]]:
    try:
        from saert.demos.app import launch, open_default
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise UserError("saert app needs gradio: pip install 'saert[demo]'") from None
    return launch, open_default


@contextmanager
def _no_collection() -> Iterator[None]:
    """What imports make stays; looking through it all again and again was 15% of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
