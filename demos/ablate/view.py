"""The data of `saert.demos.ablate.data` as the Ablate tab's widgets and sentences show it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
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
LOSSES = ("loss_change", "attributed_loss")  # which nothing after the last token has
STALE = "The text has changed: press Look to see its tokens."
Data = Mapping[str, Any]


def status(seen: Data) -> str:
    """Where we are, how many latents, and what it took; as HTML."""
    shown, active = len(seen["latents"]), seen["active"]
    which = f"{active} active latents" if shown == active else f"strongest {shown} of {active}"
    token = quoted(seen["tokens"][seen["position"]])
    cost = f"{seen['seconds']:.1f} s"
    if seen["method"] == "attribution":
        of = "" if seen["target"] is None else f" of {quoted(seen['target'])}"
        how = f"estimated{of} with one backward pass in {cost}"
    else:
        how = f"{shown} true ablations in {cost}"
    return escape(f"Token {seen['position']}, {token}: {which}, {how}.", quote=False)


def special(seen: Data, at: int) -> str:
    """What is said instead of effects at a special token; as HTML."""
    return escape(
        f"Token {at}, {seen['tokens'][at]}, is a special token: the sparse autoencoder is not "
        "made for it. Choose another.",
        quote=False,
    )


def tokens(seen: Data, specials: Collection[str] = ()) -> list[Token]:
    """The text, with the chosen token; special ones stand back."""
    found = tokens_with(seen["tokens"], selected=seen["position"])
    for token in found:
        if token["text"] in specials:
            token |= {"muted": True, "title": f"{token['title']}: special, left out"}
    return found


def latents(seen: Data, selected: int | None = None) -> list[Bar]:
    """The ranked latents, with the effect as the bar."""
    unit = "" if seen["by"] == "attributed_logit" else " nats"
    form = ".2g" if seen["by"] == "kl" else "+.2g"
    rows = []
    for one in seen["latents"]:
        facts = [one["label"], f"active {one['activation']:.2f}"]
        if one["sparsity"] is not None:
            facts.append(f"moves {one['sparsity']:.0%}")
        label = " · ".join(fact for fact in facts if fact)
        rows.append((named(one["latent"]), label, said(one["score"], form, unit),
                     one["score"] or 0))  # fmt: skip
    chosen = [one["latent"] for one in seen["latents"]]
    return bars_with(rows, chosen.index(selected) if selected in chosen else None)


def named(latent: int) -> str:
    """A latent by number."""
    return f"#{latent}"


def marked(ranked: Sequence[Bar] | None) -> int | None:
    """The latent that is selected in what the page shows."""
    names = [bar["name"] for bar in ranked or [] if bar.get("selected")]
    return int(names[0].lstrip("#")) if names else None


def choices(seen: Data) -> list[tuple[str, int]]:
    """The ranked latents by name, to choose several of."""
    return [
        (f"{named(one['latent'])} {one['label']}".strip(), one["latent"]) for one in seen["latents"]
    ]


def facts(one: Data) -> list[Figure]:
    """A latent's effect in numbers."""
    loss = "of the next token, mean over the horizon"
    return [
        Figure(name="activation", value=f"{one['activation']:.2f}", note="at this token"),
        Figure(name="KL", value=said(one["kl"], ".2g", " nats"),
               note="of the predictions without it, mean over the horizon"),
        Figure(name="loss change", value=said(one["loss_change"], "+.2g", " nats"),
               note="nothing follows the last token" if one["loss_change"] is None else loss),
        Figure(name="logits moved", value=said(one["sparsity"], ".0%"),
               note="share of them that the effect is spread over"),
    ]  # fmt: skip


def sentence(one: Data) -> str:
    """How far the effect is spread, in sentences; as HTML."""
    label = escape(one["label"], quote=False)
    name = f"<b>Latent {named(one['latent'])}</b>" + (f", {label}" if label else "")
    if one["sparsity"] is None:
        return f"{name}. Ablating it here changes no prediction."
    over = len(one["tokens"])
    tokens = "the next token" if over == 1 else f"what follows {over} tokens"
    return (
        f"{name}. Ablating it here moves about {one['sparsity']:.0%} of the {one['logits']:,} "
        f"logits that predict {tokens}. The fewer, the more specific the latent; random noise "
        "would move 64%."
    )


def by_token(one: Data) -> list[Token]:
    """The effect from the chosen token on; nothing where that is one token, as a figure says it."""
    if len(one["tokens"]) == 1:
        return []
    found = tokens_with(one["tokens"], one["kl_by_token"], "KL", form=".2g")
    for token, change in zip(found, one["loss_change_by_token"], strict=True):
        token["title"] += f" nats, next token's loss {said(change, '+.2g')}"
    return found


def by_token_legend(one: Data) -> list[str]:
    """What full colour is in `by_token`."""
    top = max((x for x in one["kl_by_token"] if x is not None), default=0.0)
    return ["", f"{top:.2g} nats"]


def moved(rows: Sequence[Data]) -> list[Bar]:
    """Promoted or suppressed tokens."""
    return bars_with(
        [(spelled(row["token"]), "", f"{row['change']:+.2f}", row["change"]) for row in rows]
    )
