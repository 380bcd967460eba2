"""How strong is strong: a slider over a latent's own largest activation.

    amount = sign(p) · unit · (9^(|p| / 50) - 1) / 8        p from -100 to 100

so that 0 is nothing, 50 is once the unit and 100 is ten times it, fine near 0 and coarse far out.
"""

from __future__ import annotations

import math

import torch

from saert.demos.pieces import ids_of
from saert.demos.workbench import Workbench
from saert.measure.steering import EditSpec
from saert.runtime import attach

ASSUMED = 10.0

# The same two in the browser, so that slider and box move together without asking the server.
# A row's title has its unit.
_UNIT = "+(document.querySelector('#steer-{place}-title [data-unit]')?.dataset.unit ?? 1)"
_AMOUNT = "Number((Math.sign(p) * unit * (9 ** (Math.abs(p) / 50) - 1) / 8).toPrecision(3))"


def amount_js(place: int) -> str:
    """Slider to box, in the row at a place."""
    return f"p => {{ const unit = {_UNIT.format(place=place)}; return {_AMOUNT}; }}"


def moved_js(place: int) -> str:
    """(edits, box, slider) as the server is to have them: the box as the slider says."""
    unit = _UNIT.format(place=place)
    return f"(edits, box, p) => {{ const unit = {unit}; return [edits, {_AMOUNT}, p]; }}"


def position_js(place: int) -> str:
    """Box to slider."""
    return f"""amount => {{ const unit = {_UNIT.format(place=place)};
  const p = Math.sign(amount) * 50 * Math.log(1 + 8 * Math.abs(amount) / unit) / Math.log(9);
  return Math.max(-100, Math.min(100, Math.round(p))); }}"""


def position(strength: float, unit: float) -> int:
    """The place of the slider nearest to a strength; the ends for what lies beyond them."""
    place = math.copysign(50 * math.log1p(8 * abs(strength) / unit) / math.log(9), strength)
    return max(-100, min(100, round(place)))


def unit(bench: Workbench, spec: EditSpec, prompt: str = "") -> tuple[float, str]:
    """What the middle of the slider's right half stands for, and in words where that is from."""
    if spec.op == "scale":
        return 1.0, "the factor 1 leaves it as it is"
    if (known := bench.largest(spec.sae, spec.latent)) is not None and known > 0:
        return known, f"strongest seen: {known:.3g}"
    here = strongest_here(bench, spec.sae, prompt)[1][spec.latent] if prompt.strip() else 0.0
    if here > 0:
        return float(here), f"strongest in this prompt: {here:.3g}"
    return ASSUMED, f"no record of its activations: {ASSUMED:g} assumed"


@torch.no_grad()
def strongest_here(bench: Workbench, source: str, prompt: str) -> tuple[list[int], torch.Tensor]:
    """Latents of an SAE that fire in a prompt, strongest first, and all maxima [num_latents].

    The first token is left out where there are others: many latents fire on nothing but it.

    Raises UserError for a prompt that is empty or too long.
    """
    ids = ids_of(bench, prompt)
    model, sae = bench.model(), bench.sae(source).sae
    with attach(model, sae, strict=bench.session.strict) as attachment:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        code = next(iter(attachment.codes.values()))
    first = min(1, ids.shape[1] - 1)
    found, values = code.indices[0, first:].flatten().cpu(), code.values[0, first:].flatten()
    highest = torch.zeros(sae.num_latents)
    highest.scatter_reduce_(0, found.long(), values.float().cpu(), "amax")
    order = highest.argsort(descending=True)[: int((highest > 0).sum())]
    return order.tolist(), highest
