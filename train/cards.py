"""The model card of a trained SAE: what it is, how it was trained, what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from saert.sae import SAE

CARD = """\
---
library_name: saert
base_model: {base_model}
tags: [sparse-autoencoder, interpretability, saert{extra_tag}]
{datasets}---
# {kind} of `{where}` in {base_model}

{num_latents:,} latents, width {d_in}{to}, {activation}; trained with the {objective} objective on
{tokens:,} tokens.

```python
from saert import attach, load
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base_model}")
tokenizer = AutoTokenizer.from_pretrained("{base_model}")
sae = load("THIS_REPOSITORY", "{path}")
with attach(model, sae) as attachment:
    model(**tokenizer("Once upon a time", return_tensors="pt"))
    print(attachment.codes["{hookpoint}"])
```

## Measured

{measured}

## Training

`training.json` in this folder holds the whole configuration, the versions and what the data were.

```json
{settings}
```
"""

MEASURED = """\
On {tokens:,} held-out tokens, special tokens {special}:

| | |
| --- | --- |
| fraction of variance unexplained (FVU) | {fvu:.4f} |
| active latents per token (L0) | {l0:.2f} |
| latents that never fire in these tokens | {dead:.2%} |
| cross-entropy, nats per token: model / spliced / zeroed | {ce:.3f} / {ce_spliced:.3f} / \
{ce_zero:.3f} |
| cross-entropy recovered | {ce_recovered:.2%} |
| KL from the model, nats per token: spliced / zeroed | {kl_spliced:.4f} / {kl_zero:.3f} |
| KL recovered | {kl_recovered:.2%} |
"""


def card(sae: SAE, name: str, record: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    """The README.md of one SAE. `record` is the run's `run.json`; metrics None: not evaluated."""
    config = record["config"]
    data, model = config["data"], config["model"]["name"]
    dataset = f"datasets: [{data['source'][0]}]\n" if "dataset" in record["data"] else ""
    arrow = "" if sae.target_hookpoint is None else f" -> {sae.target_hookpoint}"
    special = "left out" if config["stream"]["exclude_special"] else "included"
    measured = (
        "Nothing: the run held out no text (`data.holdout = 0`)."
        if metrics is None
        else MEASURED.format(**metrics, special=special)
    )
    shown = {
        key: config[key] for key in ("objective", "optimiser", "sae", "stream", "tokens", "seed")
    }
    return CARD.format(
        base_model=model,
        extra_tag=", transcoder" if arrow else "",
        datasets=dataset,
        kind="Sparse transcoder" if arrow else "Sparse autoencoder",
        where=f"{sae.hookpoint}{arrow}",
        hookpoint=sae.hookpoint,
        num_latents=sae.num_latents,
        d_in=sae.d_in,
        to=f" to {sae.d_out}" if arrow else "",
        activation=repr(sae.activation),
        objective=config["objective"]["name"],
        tokens=config["tokens"],
        path=name,
        measured=measured,
        settings=json.dumps(shown, indent=2),
    )
