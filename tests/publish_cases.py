"""SAEs to publish, with measurements."""

from pathlib import Path
from typing import Any

import torch
from sae_cases import make

from saert.hub.format import save

MODEL = "someone/model"
KINDS = {"resid_post.0": "topk", "resid_post.1": "jumprelu", "resid_post.2": "batchtopk",
         "resid_post.3": "gated"}  # fmt: skip
METRICS = dict(
    fvu=0.25, l0=5.0, dead=0.125, ce=2.0, ce_spliced=2.5, ce_zero=7.0, ce_recovered=0.9,
    kl_spliced=0.5, kl_zero=5.0, kl_recovered=0.9, tokens=4096,
    density=[0, 0, 0, 0, 0, 1, 5, 10, 5, 0, 0, 0],
)  # fmt: skip


def an_sae(act="topk", at="resid_post.0", mark=0.0, **options: Any):
    sae = make(act, hookpoint=at, dtype=torch.float32, **options)
    sae.W_dec.data[0, 0] += mark
    sae.metadata = {"base_model": MODEL, "metrics": dict(METRICS)}
    return sae


def a_folder(at: Path) -> Path:
    """Four SAEs of different kinds, and a transcoder in bfloat16."""
    for name, kind in KINDS.items():
        save(an_sae(kind, name), at / name)
    transcoder = an_sae("relu", "mlp_in.0", kind="transcoder_skip").to(torch.bfloat16)
    save(transcoder, at / "mlp_in.0")
    return at
