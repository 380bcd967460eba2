"""The data of `saert.demos.refine.data` as the Refine tab's widgets and sentences show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from saert.demos.pieces import bars_with, quoted, said, spelled, tokens_with
from saert.demos.widgets import Bar, Figure, Token

Data = Mapping[str, Any]
Column = Sequence[float | None]
HEATS: dict[str, str] = {
    "error": "Reconstruction error as encoded",
    "error_refined": "Reconstruction error, refined",
    "shrinkage": "Change of the activations",
    "loss": "Loss added by the splice, as encoded",
    "loss_refined": "Loss added by the splice, refined",
    "kl": "KL divergence by the splice, as encoded",
    "kl_refined": "KL divergence by the splice, refined",
}
STALE = "The text has changed: press Refine again."
PAIRS = (("error", "error_refined"), ("loss", "loss_refined"), ("kl", "kl_refined"))


def column(seen: Data, which: str) -> list[float | None]:
    """One of HEATS, a number for each token. Losses stand at the token that is predicted."""
    run = seen["respliced" if which.endswith("_refined") else "spliced"]
    if which == "shrinkage":
        return list(seen["shrinkage_by_token"])
    if which.startswith("error"):
        return list(run["error_by_token"])
    if which.startswith("kl"):
        return list(run["kl_by_token"])
    added = [
        None if new is None or old is None else new - old
        for new, old in zip(run["ce_by_token"], seen["model"]["ce_by_token"], strict=True)
    ]
    return [None, *added]


def tokens(seen: Data, which: str, selected: int | None = None) -> list[Token]:
    """The text, coloured; both of a pair in the same units, so that they can be compared.

    Special tokens stand back: they are not refined.
    """
    form = "+.0%" if which == "shrinkage" else ".3g"
    found = tokens_with(
        seen["tokens"], column(seen, which), HEATS[which].lower(), selected=selected,
        largest=_largest(seen, which), form=form,
    )  # fmt: skip
    for token, out in zip(found, seen["left_out"], strict=True):
        if out:
            token |= {"muted": True, "title": f"{token['title']}: special, left out"}
    return found


def legend(seen: Data, which: str) -> list[str]:
    """What full colour is in `tokens`."""
    if which == "shrinkage":
        words = f"{_largest(seen, which):.0%}"
        return [f"weaker by {words}", f"stronger by {words}"]
    top = f"{_largest(seen, which):.3g}" + ("" if which.startswith("error") else " nats")
    if which.startswith("loss"):
        return [f"{top} less", f"{top} more"]
    return ["", top]


def _largest(seen: Data, which: str) -> float:
    together = [x for pair in PAIRS if which in pair for name in pair for x in column(seen, name)]
    values = together or column(seen, which)
    return max((abs(x) for x in values if x is not None), default=0.0)


def summary(seen: Data) -> list[Figure]:
    """The whole text in numbers."""
    bare, old, new = seen["model"], seen["spliced"], seen["respliced"]
    return [
        _pair("FVU", old["fvu"], new["fvu"], ".4f",
              "not defined: one token has no variance" if old["fvu"] is None else
              "fraction of the hidden states' variance that is not reconstructed"),
        _pair("error", old["error"], new["error"], ".3f", "mean ‖y − ŷ‖, in the model's units"),
        Figure(name="shrinkage", value=_said(seen["shrinkage"], "+.1%"),
               note="mean change of the activations; above 0 the encoder's were too small"),
        _pair("L0", seen["l0"], seen["l0_refined"], ".1f", "active latents per token"),
        _pair("loss added", _less(old["ce"], bare["ce"]), _less(new["ce"], bare["ce"]), "+.4f",
              f"nats per token when spliced in; the model's own loss is {said(bare['ce'], '.3f')}"),
        _pair("KL", old["kl"], new["kl"], ".4f", "of the predictions when spliced in, nats"),
    ]  # fmt: skip


def token_summary(seen: Data, at: int) -> list[Figure]:
    """One token in numbers."""
    old, new = seen["spliced"], seen["respliced"]
    loss, refined = (column(seen, which)[at] for which in ("loss", "loss_refined"))
    return [
        _pair("error", old["error_by_token"][at], new["error_by_token"][at], ".3f", "‖y − ŷ‖"),
        _pair("FVU", old["fvu_by_token"][at], new["fvu_by_token"][at], ".4f",
              "squared error in units of the text's variance"),
        Figure(name="activations", value=_said(seen["shrinkage_by_token"][at], "+.1%"),
               note="mean change, weighted by strength"),
        _pair("loss of this token", loss, refined, "+.4f", "added by the splice, nats"),
        _pair("KL after it", old["kl_by_token"][at], new["kl_by_token"][at], ".4f",
              "of what is predicted next, nats"),
    ]  # fmt: skip


def status(seen: Data) -> str:
    """What was done, and how far it got; as HTML."""
    used = seen["left_out"].count(False)
    left = len(seen["tokens"]) - used
    special = f"; {left} special left as {'it is' if left == 1 else 'they are'}" if left else ""
    end = "" if seen["converged"] else " Some tokens are not at their optimum yet."
    tokens = "1 token" if used == 1 else f"{used} tokens"
    return f"{tokens} refined in {seen['seconds']:.1f} s{special}.{end}"


def about(seen: Data, at: int) -> str:
    """Which token the lower half is about; as HTML."""
    text = f"<b>Token {at}, {escape(quoted(seen['tokens'][at]), quote=False)}</b>"
    if seen["left_out"][at]:
        return f"{text}: a special token, neither refined nor replaced."
    active = len(seen["latents"][at])
    if not active:
        return f"{text}: no latent is active."
    return f"{text}: {active} active latent{'' if active == 1 else 's'}."


def latents(seen: Data, at: int) -> list[Bar]:
    """A token's latents: what the encoder says, and what reconstructs best."""
    rows = []
    for one in seen["latents"][at]:
        change = one["after"] / one["before"] - 1
        words = "silenced" if one["after"] == 0 else _minus(f"{change:+.0%}")
        value = f"{one['before']:.2f} → {one['after']:.2f} · {words}"
        rows.append((f"#{one['latent']}", one["label"], value, one["after"]))
    return bars_with(rows)


def predicted(run: Data, at: int) -> list[Bar]:
    """The likeliest next tokens after one."""
    return [
        Bar(name=spelled(one["token"]), label="", value=f"{one['p']:.1%}", share=one["p"])
        for one in run["top"][at]
    ]


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _pair(name: str, old: float | None, new: float | None, form: str, note: str) -> Figure:
    return Figure(name=name, value=f"{_said(old, form)} → {_said(new, form)}", note=note)


def _said(x: float | None, form: str) -> str:
    return _minus(said(x, form))


def _minus(words: str) -> str:
    return words.replace("-", "−")  # noqa: RUF001 - the sign
