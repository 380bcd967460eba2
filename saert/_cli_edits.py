"""Edits, latents and positions as options spell them: `[HOOKPOINT/]LATENT:AMOUNT`, `2:10`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from saert.edits import Edit, Phase, ablate, add, clamp, scale
from saert.hookpoint import Hookpoint
from saert.hub.session import Loaded, Session, UserError


def find(session: Session, spec: str, option: str) -> tuple[Loaded, str]:
    """The SAE that `[HOOKPOINT/]REST` names, and REST."""
    where, slash, rest = spec.rpartition("/")
    names = ", ".join(one.name for one in session.saes)
    if not slash:
        if len(session.saes) > 1:
            raise UserError(
                f"{option} {spec}: {len(session.saes)} SAEs are attached ({names}); say which: "
                f"{option} {session.saes[0].name}/{spec}"
            )
        return session.saes[0], spec
    wanted = Hookpoint.parse(where)
    found = [one for one in session.saes if one.sae.hookpoint == wanted]
    if len(found) != 1:
        raise UserError(f"{option} {spec}: {len(found)} SAEs at {wanted}; attached: {names}")
    return found[0], rest


def read_edits(
    session: Session,
    *,
    add_: Sequence[str] = (),
    clamp_: Sequence[str] = (),
    scale_: Sequence[str] = (),
    ablate_: Sequence[str] = (),
    positions: str | None = None,
    phase: Phase = "all",
) -> list[Edit]:
    """Edits from options, in the order add, clamp, scale, ablate."""
    where: dict[str, Any] = {"positions": read_positions(positions), "phase": phase}
    found: list[Edit] = []
    kinds: list[tuple[str, Sequence[str], Callable[..., Edit]]] = [
        ("--add", add_, add),
        ("--clamp", clamp_, clamp),
        ("--scale", scale_, scale),
    ]
    for option, specs, make in kinds:
        for spec in specs:
            loaded, rest = find(session, spec, option)
            latents, amount = _latents_and_amount(option, rest)
            if len(latents) != 1 or amount is None:
                raise UserError(
                    f"{option} {spec}: expected LATENT:AMOUNT, for example {option} 17:8"
                )
            found.append(make(_known(loaded, latents[0], option), amount, sae=loaded.sae, **where))
    for spec in ablate_:
        loaded, rest = find(session, spec, "--ablate")
        latents, amount = _latents_and_amount("--ablate", rest)
        chosen = [_known(loaded, latent, "--ablate") for latent in latents]
        found.append(ablate(chosen, amount or 0.0, sae=loaded.sae, **where))
    return found


def read_positions(text: str | None) -> int | list[int] | slice | None:
    """`3`, `-1`, `0,4`, `2:10`, `::2`."""
    if text is None:
        return None
    try:
        if ":" in text:
            parts = [int(part) if part.strip() else None for part in text.split(":")]
            if len(parts) > 3:
                raise ValueError
            return slice(*parts)
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--positions {text}: expected a position, positions or a slice: 3, -1, 0,4 or 2:10"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def latent_of(session: Session, spec: str, option: str) -> tuple[Loaded, int]:
    """`[HOOKPOINT/]LATENT`."""
    loaded, rest = find(session, spec, option)
    latents, amount = _latents_and_amount(option, rest)
    if len(latents) != 1 or amount is not None:
        raise UserError(f"{option} {spec}: expected one latent, for example {option} 17")
    return loaded, _known(loaded, latents[0], option)


def _latents_and_amount(option: str, text: str) -> tuple[list[int], float | None]:
    match = re.fullmatch(r"\s*(\d+(?:\s*,\s*\d+)*)\s*(?::(.*))?", text)
    if match is None:
        raise UserError(
            f"{option} {text}: expected latents as numbers, for example "
            + ("17 or 17,18" if option == "--ablate" else "17" if option == "--latent" else "17:8")
        )
    latents = [int(part) for part in match[1].split(",")]
    if match[2] is None:
        return latents, None
    try:
        return latents, float(match[2])
    except ValueError:
        raise UserError(f"{option} {text}: {match[2]!r} is no number") from None


def _known(loaded: Loaded, latent: int, option: str) -> int:
    if latent >= loaded.sae.num_latents:
        raise UserError(
            f"{option} {latent}: the SAE at {loaded.name} has {loaded.sae.num_latents} latents, "
            f"0 to {loaded.sae.num_latents - 1}"
        )
    return latent
