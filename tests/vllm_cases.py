"""Prompts, edits, and what saert on transformers makes of them: greedy tokens and codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saert.measure.steering.spec import EditSpec
from saert.runtime import attach
from saert.sae import SAE

RESID, EARLY, MLP = "resid_post.2", "resid_post.1", "mlp_in.2"
BUNDLED = [f"bundled:{name}" for name in (RESID, EARLY, MLP)]


def spec(sae: str, latent: int, op: str = "add", amount: float = 0.0, **rest: Any) -> dict:
    """An edit as plain data."""
    return EditSpec(sae, latent, op, amount, **rest).to_dict()  # type: ignore[arg-type]


FOOD = spec(RESID, 71, "add", 9.0)
MIXED: list[list[dict]] = [
    [FOOD],
    [],
    [
        spec(RESID, 546, "ablate"),
        spec(MLP, 5, "add", 6.0, phase="generated"),
        spec(EARLY, 9, "clamp", 8.0, phase="prompt"),
    ],
    [
        spec(f"bundled:{EARLY}", 40, "scale", 3.0),
        spec(RESID, 71, "add", 7.0, when=546, above=0.0),
        spec(RESID, 71, "scale", 2.0),
    ],
    [spec(RESID, 12, "add", 9.0, phase="generated")],
]
# What every engine is asked, and must answer alike; each changes what its prompt becomes.
AGREED: dict[str, dict[str, Any]] = {
    "add": dict(edits=[FOOD]),
    "clamp, generated": dict(edits=[spec(RESID, 12, "clamp", 9.0, phase="generated")]),
    "scale, prompt": dict(edits=[spec(EARLY, 172, "scale", 3.0, phase="prompt")]),
    "ablate": dict(edits=[spec(RESID, 31, "ablate")]),
    "splice": dict(edits=[FOOD], splice=[RESID]),
    "when": dict(edits=[spec(RESID, 71, "add", 9.0, when=277, above=0.5)]),
    "several SAEs": dict(
        edits=[
            spec(EARLY, 9, "clamp", 8.0),
            spec(MLP, 5, "add", 6.0, phase="generated"),
            spec(RESID, 71, "add", 4.0),
            spec(RESID, 71, "scale", 2.0),
        ]
    ),
}
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She liked to play in the park with her "
    "friends and her big brown dog, and she was very happy. One day, she",
    "Tom was sad. He",
    "The dog ran to the park and saw a big cat. The cat was sad because it had no friends to play "
    "with, and it was very cold. The dog said to the cat that it could come and",
    "Once upon a time, there was a little boy named Tim. Tim had a red ball and he loved to play "
    "with it. One day, his mom told him to go to the kitchen because she had made a",
    "Ben and Mia like to eat",
]


class Reference:
    """saert on transformers: one request at a time, by `attach` and `generate`."""

    def __init__(self, model: nn.Module, saes: Mapping[str, SAE]) -> None:
        self.model, self.saes = model, saes

    def __call__(
        self,
        prompt: Sequence[int],
        edits: Sequence[dict],
        tokens: int,
        splice: Sequence[str] = (),
        **options: Any,
    ) -> tuple[list[int], dict[str, Tensor]]:
        """The greedy continuation, and dense codes [tokens, num_latents] by hookpoint; `options`
        are for `generate`."""
        ids = torch.tensor([prompt])
        made = [EditSpec.from_dict(one) for one in edits]
        with attach(
            self.model,
            list(self.saes.values()),
            [one.edit(self.saes[one.sae.removeprefix("bundled:")]) for one in made],
            splice=list(splice) or False,
            record="all",
        ) as attachment:
            output = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
            codes = {name: attachment.codes[name].to_dense()[0] for name in self.saes}
        return output[0, len(prompt) :].tolist(), codes


def agreed(prompts: Sequence[Sequence[int]], reference: Reference, tokens: int) -> list[Any]:
    """Every case of `AGREED` with a prompt of its own: (prompt, wish, what `attach` answers)."""
    return [
        (
            prompts[i % len(prompts)],
            wish,
            reference(prompts[i % len(prompts)], wish["edits"], tokens, wish.get("splice", ()))[0],
        )
        for i, wish in enumerate(AGREED.values())
    ]


def dense(found: Sequence[Any], num_latents: int) -> Tensor:
    """What `vllm_run.plain` says of one code, [tokens, num_latents]."""
    indices, values = torch.tensor(found[0]), torch.tensor(found[1])
    return torch.zeros(len(indices), num_latents).scatter_add(-1, indices, values)
