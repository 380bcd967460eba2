"""The data of `ablation_data` as the Ablate tab's widgets and sentences show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saert.demos.pieces import bars_with, quoted, said, spelled, tokens_with
from saert.demos.widgets import Bar, Figure, Token

RANKS = {
    "kl": "True effect: KL divergence",
    "loss_change": "True effect: change of the loss",
    "attributed_loss": "Attribution: loss of all that follows",
    "attributed_logit": "Attribution: logit of the next token",
}
PHASES = {
    "all": "everywhere, in the text and in what follows",
    "prompt": "only in the text",
    "generated": "only in what follows",
}
EXAMPLES = (
    "Once upon a time, there was a little girl named Lily. One day, she",
    "Tom had a big red ball. He liked to play with it in the",
    "The cat was sad because it could not find its",
)
Data = Mapping[str, Any]


def status(seen: Data) -> str:
    """Where we are, how many latents, and what it took."""
    shown, active = len(seen["latents"]), seen["active"]
    which = f"{active} active latents" if shown == active else f"strongest {shown} of {active}"
    token = quoted(seen["tokens"][seen["position"]])
    cost = f"{seen['seconds']:.1f} s"
    if seen["method"] == "attribution":
        of = "" if seen["target"] is None else f" of {quoted(seen['target'])}"
        how = f"estimated{of} with one backward pass in {cost}"
    else:
        how = f"{shown} true ablations in {cost}"
    return f"Token {seen['position']}, {token}: {which}, {how}."


def tokens(seen: Data) -> list[Token]:
    """The text, with the chosen token."""
    return tokens_with(seen["tokens"], selected=seen["position"])


def latents(seen: Data, selected: int | None = None) -> list[Bar]:
    """The ranked latents, with the effect as the bar."""
    unit = "" if seen["by"] == "attributed_logit" else " nats"
    form = ".2g" if seen["by"] == "kl" else "+.2g"
    rows = []
    for one in seen["latents"]:
        facts = [one["label"], f"active {one['activation']:.2f}"]
        if one["sparsity"] is not None:
            facts.append(f"sparsity {one['sparsity']:.0%}")
        label = " · ".join(fact for fact in facts if fact)
        rows.append((f"{one['latent']}", label, said(one["score"], form, unit), one["score"] or 0))
    chosen = [one["latent"] for one in seen["latents"]]
    return bars_with(rows, chosen.index(selected) if selected in chosen else None)


def choices(seen: Data) -> list[tuple[str, int]]:
    """The ranked latents by name, to choose several of."""
    return [(f"{one['latent']} {one['label']}".strip(), one["latent"]) for one in seen["latents"]]


def facts(one: Data) -> list[Figure]:
    """A latent's effect in numbers."""
    return [
        Figure(name="activation", value=f"{one['activation']:.2f}", note="at this token"),
        Figure(name="KL", value=said(one["kl"], ".2g", " nats"),
               note="of the predictions without it, mean over the horizon"),
        Figure(name="loss change", value=said(one["loss_change"], "+.2g", " nats"),
               note="of predicting the next token without it, mean over the horizon"),
        Figure(name="sparsity", value=said(one["sparsity"], ".0%"),
               note="share of the logits that its ablation reaches"),
    ]  # fmt: skip


def sentence(one: Data) -> str:
    """How sparse the effect is, in a sentence."""
    name = f"**Latent {one['latent']}**" + (f", {one['label']}" if one["label"] else "")
    if one["sparsity"] is None:
        return f"{name}: ablating it here changes no prediction."
    over = len(one["tokens"])
    tokens = "this token's" if over == 1 else f"{over} tokens'"
    return (
        f"{name}: ablating it here moves {tokens} predictions as if {one['sparsity']:.0%} of the "
        f"{one['logits']:,} logits changed and the others stayed; random noise would move 64%."
    )


def by_token(one: Data) -> list[Token]:
    """The effect from the chosen token on."""
    found = tokens_with(one["tokens"], one["kl_by_token"], "KL", form=".2g")
    for token, change in zip(found, one["loss_change_by_token"], strict=True):
        token["title"] += f" nats, next token's loss {said(change, '+.2g')}"
    return found


def moved(rows: Sequence[Data]) -> list[Bar]:
    """Promoted or suppressed tokens."""
    return bars_with(
        [(spelled(row["token"]), "", f"{row['change']:+.2f}", row["change"]) for row in rows]
    )
