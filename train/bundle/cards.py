# ruff: noqa: E501  (a line of a card is as long as its prose)
"""Model cards of the embedded default. Every number in them was measured by the run itself."""

from __future__ import annotations

from typing import Any

from saert.sae import SAE
from saert.train.bundle.config import Recipe

COMMAND = (
    "torchrun --nproc-per-node 2 -m saert.train bundled --text FILE [--text FILE] --out FOLDER"
)

SOURCE = """\
The text is [TinyStories](https://huggingface.co/datasets/roneneldan/TinyStories) (Eldan and Li, 2023),
licensed CDLA-Sharing-1.0, as windows of about 500 characters that start and end anywhere. About 1% of
the windows is held out; training windows that share {shingle} consecutive characters with a held-out
one were dropped."""


def language_model(
    recipe: Recipe, parameters: int, metrics: dict[str, dict[str, float]], sample: str
) -> str:
    """The card of the story-telling model."""
    c = recipe.language_model
    rows = "\n".join(
        f"| {name} | {m['bits_per_character']:.3f} | {m['bits_per_character_starts']:.3f} |"
        for name, m in metrics.items()
    )
    own = metrics["bundled"]
    story = "\n".join(f"> {line}" for line in sample.splitlines())
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
datasets: [roneneldan/TinyStories]
tags: [gpt2, tinystories, interpretability, saert]
---
# saert's bundled story-teller

A GPT-2-architecture language model with {parameters / 1e6:.2f} million parameters ({c.layers} blocks,
width {c.d_model}, {c.heads} heads, context {c.context}) and its own byte-level BPE of {c.vocab_size:,}
tokens. It tells short children's stories, well enough to see a steered feature at work on any CPU. It
is a teaching object: it knows nothing, and its stories lose their thread.

```python
from saert.hub import bundled

model, tokenizer = bundled.model(), bundled.tokenizer()
story = model.generate(**tokenizer("Once upon a time", return_tensors="pt"))
print(tokenizer.decode(story[0], skip_special_tokens=True))
```

## A sample

{story}

Sampled with the settings of `generation_config.json`, seed 0.

## Measured

Bits per character of held-out text ({own["characters"]:,} characters; each segment scored after the
model's own first token of a text). "Starts" counts segments that begin a story: other models know no
token for text that begins in the middle, so that column is the fairer comparison.

| model | all segments | starts |
| --- | --- | --- |
{rows}

## Training

{SOURCE.format(shingle=recipe.data.shingle)} A segment from the middle of a story follows `<|cut|>`,
which generation never emits; `<|endoftext|>` opens and ends a story.

{c.steps:,} steps of {c.batch} × {c.context} tokens ({c.steps * c.batch * c.context / 1e6:.1f} million),
AdamW, rate {c.lr:g}, linear warm-up, linear decay to zero over the last {c.decay:.0%}, weight decay
{c.weight_decay:g}, seed {c.seed}. The recipe is `train/recipes/bundled.toml`:

```
{COMMAND}
```
"""


def sae(sae: SAE, recipe: Recipe, metrics: dict[str, Any]) -> str:
    """The card of one SAE or transcoder."""
    c = recipe.sae
    what = f"TopK sparse autoencoder of `{sae.hookpoint}`"
    if sae.target_hookpoint is not None:
        what = f"TopK transcoder from `{sae.hookpoint}` to `{sae.target_hookpoint}`"
    return f"""\
---
license: apache-2.0
library_name: saert
base_model: saert/bundled-tinystories
datasets: [roneneldan/TinyStories]
tags: [sparse-autoencoder, interpretability, saert]
---
# {what}

{sae.num_latents:,} latents, k = {sae.activation.k}, width {sae.d_in}; reads saert's bundled story-telling model.

```python
from saert import add, attach
from saert.hub import bundled

model, tokenizer = bundled.model(), bundled.tokenizer()
sae = bundled.sae("{sae.hookpoint}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
with attach(model, sae, edits=[add(0, 8.0)]) as attachment:
    print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
    print(attachment.codes["{sae.hookpoint}"])
```

## Measured

On {metrics["tokens"]:,} held-out tokens in rows of {recipe.language_model.context}, every position
included:

| | |
| --- | --- |
| fraction of variance unexplained (FVU) | {metrics["fvu"]:.4f} |
| active latents per token (L0) | {metrics["l0"]:.2f} |
| latents that never fire in these tokens | {metrics["dead"]:.2%} |
| cross-entropy, nats per token: model / spliced / zeroed | {metrics["ce"]:.3f} / \
{metrics["ce_spliced"]:.3f} / {metrics["ce_zero"]:.3f} |
| cross-entropy recovered | {metrics["ce_recovered"]:.2%} |

## Training

{SOURCE.format(shingle=recipe.data.shingle)}

{c.tokens / 1e6:.1f} million tokens of activations in batches of {c.batch_tokens:,}, Adam, rate
{c.lr:g} at 16,384 latents scaled by 1/√num_latents, AuxK {c.k_aux} at {c.aux_coefficient:g}, seed
{c.seed}; decoder directions have unit norm. The recipe is `train/recipes/bundled.toml`:

```
{COMMAND}
```
"""
