"""Other ways to read the same weights: elsewhere, transformed otherwise, activated otherwise.

Each is a mistake that a loader, a config or a person could have made, undone. Where one of them
fits far better than the SAE as it is, that mistake was probably made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saert.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from saert.architecture import SITES, locate
from saert.hookpoint import Hookpoint, HookpointError, blocks
from saert.sae import SAE
from saert.transforms import (
    DatasetScale,
    InputTransform,
    LayerNorm,
    MeanCentre,
    NoTransform,
    UnitNorm,
)

FACTORS = (0.25, 0.5, 2.0, 4.0)  # of a dataset's scale
UNITS = (0.01, 0.1, 0.5, 2.0, 10.0, 100.0)  # of thresholds
CALIBRATION = 64  # tokens whose scores set a threshold


@dataclass(frozen=True)
class Reading:
    """What would be done otherwise, in words, and the SAE that does so.

    `kind` is "place", "transform", "b_dec", "activation" or "orientation".
    """

    kind: str
    what: str
    sae: SAE
    read: Hookpoint
    write: Hookpoint


def changed(sae: SAE, **changes: Any) -> SAE:
    """The same tensors, not copied, read otherwise."""
    settings: dict[str, Any] = {
        name: getattr(sae, name)
        for name in (
            "activation", "hookpoint", "target_hookpoint", "input_transform", "subtract_b_dec",
            "W_skip", "select_by_decoder_norm", "metadata",
        )
    }  # fmt: skip
    tensors = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    for name in tensors.keys() & changes.keys():
        tensors[name] = changes.pop(name)
    other = SAE(**tensors, **(settings | changes))
    return other.requires_grad_(False).to(sae.device)  # thresholds may have been made elsewhere


def places(
    model: nn.Module, read: Hookpoint, write: Hookpoint, *, far: bool = False
) -> list[tuple[Hookpoint, Hookpoint]]:
    """(read, write) near those given: other sites of the block, the same ones of its neighbours.

    With `far` the same sites of all other layers. Empty for a path that is no site of the model.
    """
    read, write = (_as_site(model, one) or one for one in (read, write))
    if read.layer is None or write.layer is None:
        return []
    depth = len(blocks(model)[1])
    if far:
        shifts = [layer - read.layer for layer in range(depth)]
        return list(_shifted(read, write, (s for s in shifts if abs(s) > 1), depth))
    near = [Hookpoint(site=site, layer=read.layer) for site in SITES[1:]]
    if read == write:
        found = [(one, one) for one in near]
    else:
        found = [(one, write) for one in near]
        found += [(read, Hookpoint(site=site, layer=write.layer)) for site in SITES[1:]]
    found += _shifted(read, write, (-1, 1), depth)
    return [pair for pair in dict.fromkeys(found) if pair != (read, write)]


def _shifted(
    read: Hookpoint, write: Hookpoint, shifts: Any, depth: int
) -> Iterator[tuple[Hookpoint, Hookpoint]]:
    assert read.layer is not None and write.layer is not None
    for shift in shifts:
        if 0 <= read.layer + shift < depth and 0 <= write.layer + shift < depth:
            yield (
                Hookpoint(site=read.site, layer=read.layer + shift),
                Hookpoint(site=write.site, layer=write.layer + shift),
            )


def _as_site(model: nn.Module, hookpoint: Hookpoint) -> Hookpoint | None:
    """A module path as the site that it is in this model, if it is one."""
    if hookpoint.path is None:
        return hookpoint
    with suppress(HookpointError):
        where = hookpoint.resolve(model)
        for layer in range(len(blocks(model)[1])):
            for site in ("resid_post", *SITES[1:]):
                with suppress(HookpointError):
                    if locate(model, site, layer) == where:
                        return Hookpoint(site=site, layer=layer)
    return None


def exists(model: nn.Module, hookpoint: Hookpoint, width: int) -> bool:
    """Whether a model has a hookpoint, of this width as far as is known without a run."""
    try:
        return hookpoint.resolve(model).width in (None, width)
    except HookpointError:
        return False


def elsewhere(
    sae: SAE,
    hidden: Mapping[Hookpoint, Tensor],
    pairs: list[tuple[Hookpoint, Hookpoint]],
    read: Hookpoint,
    write: Hookpoint,
) -> Iterator[Reading]:
    """The same SAE at other places. Those that hold the same tensors become one reading."""
    found: dict[tuple[int, int], tuple[Hookpoint, Hookpoint, list[str]]] = {}
    seen = [read, write]

    def identity(at: Hookpoint) -> int:
        for number, other in enumerate(seen):
            if hidden[other].shape == hidden[at].shape and torch.equal(hidden[other], hidden[at]):
                return number
        seen.append(at)
        return len(seen) - 1

    own = (identity(read), identity(write))
    for r, w in pairs:
        if hidden[r].shape[-1] != sae.d_in or hidden[w].shape[-1] != sae.d_out:
            continue
        key = (identity(r), identity(w))
        if key == own:
            continue
        what = f"read at {r}" if r == w else f"read at {r}, written at {w}"
        found.setdefault(key, (r, w, []))[2].append(what)
    for r, w, names in found.values():
        yield Reading("place", " = ".join([names[0], *(n[8:] for n in names[1:])]), sae, r, w)


def otherwise(
    sae: SAE, x: Tensor, l0: float, declared_l0: float | None, read: Hookpoint, write: Hookpoint
) -> Iterator[Reading]:
    """Other transforms, activations, uses of b_dec and orientations, at the same place.

    x [tokens, d_in] is what is read; `l0` what the SAE as it is makes of it.
    """

    def reading(kind: str, what: str, **changes: Any) -> Reading:
        return Reading(kind, what, changed(sae, **changes), read, write)

    for transform in _transforms(sae, x):
        name = _name(transform)
        yield reading("transform", f"input transform {name}", input_transform=transform)
    if sae.b_dec is not None and sae.d_in == sae.d_out:
        flipped = not sae.subtract_b_dec
        what = "b_dec subtracted before encoding" if flipped else "b_dec not subtracted"
        yield reading("b_dec", what, subtract_b_dec=flipped)
    for what, activation in _activations(sae, x, l0, declared_l0):
        yield reading("activation", what, activation=activation)
    if sae.num_latents == sae.d_in == sae.d_out:
        turned = {"W_enc": sae.W_enc.T.contiguous(), "W_dec": sae.W_dec.T.contiguous()}
        for names in (("W_enc",), ("W_dec",), ("W_enc", "W_dec")):
            what = " and ".join(names) + " transposed"
            yield reading("orientation", what, **{name: turned[name] for name in names})


def _transforms(sae: SAE, x: Tensor) -> list[InputTransform]:
    own = sae.input_transform
    length = x.float().norm(dim=-1).mean().item()
    found: list[InputTransform] = [NoTransform(), LayerNorm(), UnitNorm(), UnitNorm(1.0)]
    found.append(MeanCentre())
    scale = own.factor if isinstance(own, DatasetScale) else 1.0
    if isinstance(own, NoTransform | DatasetScale) and length > 0:
        factors = [scale * c for c in FACTORS]
        factors += [math.sqrt(sae.d_in) / length, 1 / length]
        found += [DatasetScale(c) for c in factors if c > 0]
    if isinstance(own, UnitNorm) and length > 0:
        found.append(UnitNorm(length))
    return [one for one in dict.fromkeys(found) if one != own]


def _activations(
    sae: SAE, x: Tensor, l0: float, declared_l0: float | None
) -> Iterator[tuple[str, Activation]]:
    own, said = sae.activation, None if declared_l0 is None else round(declared_l0)
    if isinstance(own, TopK | ReLU):
        most = own.k if isinstance(own, TopK) else l0
        sizes = [said, *(round(most / c) for c in (2, 4, 8))]
        also = "" if isinstance(own, TopK) else ", or thresholds that keep as many"
        for k in dict.fromkeys(k for k in sizes if k and k <= sae.num_latents):
            if not (isinstance(own, TopK) and own.k == k):
                yield f"TopK(k={k}){also}", TopK(k)
    if isinstance(own, TopK | AbsTopK | GroupMax):
        for kind in (TopK, AbsTopK, GroupMax):
            if type(own) is not kind and (kind is not GroupMax or sae.num_latents % own.k == 0):
                yield f"{kind.__name__}(k={own.k})", kind(own.k)
    if isinstance(own, JumpReLU):
        for factor in UNITS:
            yield f"thresholds x {factor:g}", type(own)(own.threshold * factor)
        yield "exp(thresholds)", type(own)(own.threshold.float().exp())
        if said and not sae.select_by_decoder_norm:
            level = _level(sae, x, said)
            yield f"one threshold of {level:.3g}", BatchTopK(level)


def _level(sae: SAE, x: Tensor, l0: float) -> float:
    """The score that `l0` latents per token exceed on average."""
    scores = sae.pre_activations(x[:CALIBRATION]).flatten()
    kept = min(max(1, round(l0 * min(len(x), CALIBRATION))), len(scores))
    return max(0.0, scores.topk(kept).values[-1].item())


def _name(transform: InputTransform) -> str:
    if isinstance(transform, NoTransform):
        return "none"
    options = ", ".join(f"{v:.4g}" for v in vars(transform).values() if v is not None)
    if isinstance(transform, DatasetScale | UnitNorm):
        return f"{type(transform).__name__}({options})"
    return type(transform).__name__
