"""Hookpoints: the names of the tensors an SAE reads and writes, in every spelling the field uses.

    hookpoint = Hookpoint.parse("blocks.6.hook_resid_post")   # or resid_post.6, or transformer.h.6
    location = hookpoint.resolve(model)                       # Location("transformer.h.6", "out")

Parsing needs no model, and never guesses: `resid_post.6` and `transformer.h.6` stay different
hookpoints even though GPT-2 keeps both in one tensor. Whether two hookpoints coincide is a question
about a model: compare their locations. `saert.architecture` knows where the sites live.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from saert.architecture import (
    SITES,
    HookpointError,
    Location,
    Side,
    backbone,
    blocks,
    features,
    join,
    locate,
    unwrap,
)

__all__ = ["SITES", "Hookpoint", "HookpointError", "Location", "backbone", "blocks", "unwrap"]

TRANSFORMER_LENS = {  # what follows `blocks.L.`
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
}

AMBIGUOUS = {  # spelled by published SAEs, but not one tensor
    "hook_mlp_in": "TransformerLens reads the residual stream before the norm here, while SAELens "
    "labels Gemma Scope 2 transcoders with it, which read after the norm: write resid_mid.{layer} "
    "or mlp_in.{layer}",
    "ln2.hook_normalized": "this is the norm before it is multiplied by its weight, which no "
    "transformers module exposes: write mlp_in.{layer} if the SAE reads the weighted norm's output",
}


@dataclass(frozen=True)
class Hookpoint:
    """A site (`resid_post.6`, `embed`), or one side of a module (`transformer.h.6:in`)."""

    site: str | None = None
    layer: int | None = None  # None for embed and for paths
    path: str | None = None
    side: Side | None = None  # of paths only; a bare path means its output

    def __post_init__(self) -> None:
        if (self.site is None) == (self.path is None):
            raise HookpointError(
                f"expected a site or a module path, found {self.site!r} and {self.path!r}"
            )
        if self.path is not None:
            if not self.path or self.layer is not None or self.side not in ("in", "out"):
                raise HookpointError(
                    f"expected a module path with side 'in' or 'out' and no layer, found "
                    f"{self.path!r}, {self.side!r}, {self.layer!r}"
                )
            return
        if self.site not in SITES:
            raise HookpointError(f"unknown site {self.site!r}{_nearest(str(self.site), SITES)}")
        if self.side is not None:
            raise HookpointError(f"{self.site} is one tensor and has no side; found {self.side!r}")
        if self.site == "embed" and self.layer is not None:
            raise HookpointError(f"embed has no layer; found embed.{self.layer}, write embed")
        if self.site != "embed" and self.layer is None:
            raise HookpointError(
                f"{self.site} needs a layer: write {self.site}.0 for the first block's"
            )
        if self.layer is not None and self.layer < 0:
            raise HookpointError(
                f"{self.site}.{self.layer}: layers count from 0, so write the layer's own number, "
                "which for the last is one less than how many the model has"
            )

    @classmethod
    def parse(cls, spelling: str | Hookpoint) -> Hookpoint:
        """The hookpoint of any spelling: ours, TransformerLens's, sparsify's, or a module path.

        Example:
            >>> str(Hookpoint.parse("blocks.6.attn.hook_z"))
            'attn_z.6'
            >>> Hookpoint.parse("layers.6.mlp").path
            'layers.6.mlp'

        Raises:
            HookpointError: an unknown, incomplete or ambiguous spelling; names the nearest.
        """
        if isinstance(spelling, Hookpoint):
            return spelling
        path, colon, side = spelling.strip().partition(":")
        if colon:
            if side not in ("in", "out"):
                raise HookpointError(
                    f"{spelling!r}: expected :in or :out after a module path, found :{side}"
                )
            name, _, layer = path.partition(".")
            if name in SITES and layer.lstrip("-").isdigit():
                raise HookpointError(
                    f"{spelling!r}: {path} is one tensor and has no side; drop :{side}"
                )
            return cls(path=path, side="in" if side == "in" else "out")
        if "hook_" in path:
            return _transformer_lens(path)
        name, _, layer = path.partition(".")
        if name in SITES and (not layer or re.fullmatch(r"-?\d+", layer)):
            return cls(site=name, layer=int(layer) if layer else None)
        if re.fullmatch(r"-?\d+", layer) and (close := get_close_matches(name, SITES[1:], 1, 0.8)):
            raise HookpointError(f"unknown site {name!r}; did you mean {close[0]}.{layer}?")
        if not path:
            raise HookpointError(
                f"{spelling!r} names nothing; expected a site such as resid_post.6 or a path"
            )
        return cls(path=path, side="out")

    def __str__(self) -> str:
        """Ours: `resid_post.6`, `embed`, `transformer.h.6`, `transformer.h.6:in`."""
        if self.path is None:
            return str(self.site) if self.layer is None else f"{self.site}.{self.layer}"
        # A path that reads as something else without its side (a module called `embed`) keeps it.
        plain = (
            self.side == "out"
            and "hook_" not in self.path
            and self.path.partition(".")[0] not in SITES
        )
        return self.path if plain else f"{self.path}:{self.side}"

    def resolve(self, model: nn.Module) -> Location:
        """Where this hookpoint lives in `model`: a causal LM, its backbone, or a wrapper of either.

        A path is looked up in the model itself, then inside its compile or PEFT wrapper, then in
        the module that owns the blocks, then in the base model (sparsify's convention).

        Raises:
            HookpointError: no such layer, site or module here; names those nearest.
        """
        if self.path is None:
            return locate(model, str(self.site), self.layer)
        for root in _roots(model):
            try:
                module = model.get_submodule(path := join(root, self.path))
            except AttributeError:
                continue
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                first = next((f": {self.path}.{name}" for name in module._modules), "")
                raise HookpointError(
                    f"{self}: a {type(module).__name__} is never called; name a module in it{first}"
                )
            # torch.compile's wrapper also answers to its model's paths: one module, one path.
            if path not in (known := dict(model.named_modules(remove_duplicate=False))):
                path = next(name for name, found in known.items() if found is module)
            assert self.side is not None
            return Location(path, module, self.side, _width(model, path, self.side))
        # Nearest in the terms the path was written in: from the model, or from any of the roots.
        starts = [f"{root}." if root else "" for root in dict.fromkeys(_roots(model))]
        modules = [name for name, _ in model.named_modules() if name]
        names = [
            name[len(start) :] for start in starts for name in modules if name.startswith(start)
        ]
        near = (
            _nearest(self.path, names) or f"; it has {', '.join(model._modules) or 'no children'}"
        )
        raise HookpointError(f"no module {self.path!r} in {type(model).__name__}{near}")


def _transformer_lens(name: str) -> Hookpoint:
    if name == "hook_embed":
        return Hookpoint(site="embed")
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        raise HookpointError(
            f"{name!r} is no TransformerLens name saert knows{_nearest(name, _spelled('0'))}; "
            f"a module path that contains hook_ is written {name}:out"
        )
    layer, hook = match.groups()
    if hook in AMBIGUOUS:
        raise HookpointError(f"{name!r}: {AMBIGUOUS[hook].format(layer=layer)}")
    if hook not in TRANSFORMER_LENS:
        raise HookpointError(
            f"{name!r} is no TransformerLens name that is a tensor of a transformers module"
            f"{_nearest(name, _spelled(layer))}"
        )
    return Hookpoint(site=TRANSFORMER_LENS[hook], layer=int(layer))


def _spelled(layer: str) -> list[str]:
    return ["hook_embed", *(f"blocks.{layer}.{hook}" for hook in TRANSFORMER_LENS)]


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(dict.fromkeys(names)), 3, 0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def _roots(model: nn.Module) -> Iterator[str]:
    """Paths that a module path may be relative to, in the order they are tried."""
    yield ""
    wrapper, inner = unwrap(model)
    yield wrapper
    with suppress(HookpointError):  # a plain nn.Module has no blocks
        yield backbone(model)[0]
    yield join(wrapper, getattr(inner, "base_model_prefix", ""))


def _width(model: nn.Module, path: str, side: Side) -> int | None:
    """Width of one side of a module: what its site says if it is one, else what the module says."""
    with suppress(HookpointError):
        list_path, _ = blocks(model)
        layer = path.removeprefix(list_path + ".").partition(".")[0]
        if path.startswith(list_path + ".") and layer.isdigit():
            for site in SITES[1:]:
                with suppress(HookpointError):
                    location = locate(model, site, int(layer))
                    if (location.path, location.side) == (path, side):
                        return location.width
    return features(model.get_submodule(path), side)
