"""Short names for public SAEs: `gpt2:openai-32k/resid_post.6`, from the patterns of registry.toml.

    known = lookup("llama-3.1-8b:llama-scope/15")     # Known(repo=…, path=…), or None
    releases()[0].for_model("gpt2")                   # "gpt2:openai-{width}/{site}.{layer}"

A short name also knows what files do not say: that an SAE was trained on a centred residual stream,
or reads the norm before its weight.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any

import torch

from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.transforms import DatasetScale, InputTransform, MeanCentre, NoTransform, UnitNorm

TRANSFORMS: Mapping[str, type[InputTransform]] = {
    "mean_centre": MeanCentre,
    "unit_norm": UnitNorm,
}


@dataclass(frozen=True)
class Known:
    """Where a short name's SAE lies, and what its files leave out.

    Attributes:
        name: the short name; repo: Hub id; path: patterns of the SAE's path in it.
        model: Hugging Face id of the model it was trained on.
        l0: of several matching paths, the one whose average_l0_N is nearest to this.
        hookpoint, target, transform: instead of what the files say, or None.
        scale: of the inputs the SAE was trained on (SAELens' norm_scaling_factor), or None.
    """

    name: str
    repo: str
    path: tuple[str, ...]
    model: str
    l0: float | None = None
    hookpoint: str | None = None
    target: str | None = None
    transform: str | None = None
    scale: float | None = None

    def choose(self, paths: Sequence[str]) -> str:
        """The one path of the repo that is meant.

        Raises FileNotFoundError naming what there is, if none fits or several do.
        """
        fitting = [path for path in paths if any(fnmatch(path, one) for one in self.path)]
        if self.l0 is not None and len(fitting) > 1:
            fitting = sorted(fitting, key=lambda path: abs(_l0(path) - (self.l0 or 0)))[:1]
        if len(fitting) == 1:
            return fitting[0]
        shown = ", ".join((fitting or list(paths))[:8])
        raise FileNotFoundError(
            f"{self.name}: {'several' if fitting else 'nothing'} in {self.repo} called "
            f"{' or '.join(self.path)}; it holds {shown}"
        )

    def apply(self, sae: SAE) -> SAE:
        """The SAE, told what its files do not say. In place."""
        sae.metadata["name"] = self.name
        sae.metadata.setdefault("base_model", self.model)
        if self.hookpoint is not None:
            sae.hookpoint = Hookpoint.parse(self.hookpoint)
        if self.target is not None:
            sae.target_hookpoint = Hookpoint.parse(self.target)
        if self.transform is not None:
            sae.input_transform = _composed(TRANSFORMS[self.transform](), sae)
        if self.scale is not None and self.scale != 1:
            _fold(sae, self.scale)
        return sae


@dataclass(frozen=True)
class Release:
    """One pattern of registry.toml; its comments say what the fields mean."""

    name: str
    about: str
    repo: str
    path: tuple[str, ...]
    model: str
    layers: int | None = None
    l0: float | None = None
    hookpoint: str | None = None
    target: str | None = None
    transform: str | None = None
    scale: str | None = None
    fields: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    default: Mapping[str, str] = field(default_factory=dict)

    def match(self, name: str) -> Known | None:
        """What a short name means, if it is one of this pattern."""
        found = re.fullmatch(self._regex(), name)
        if found is None:
            return None
        values = self._values({key: one or "" for key, one in found.groupdict().items()})
        if values is None:
            return None

        def fill(text: str | None) -> str | None:
            return None if text is None else text.format(**values)

        path = tuple(str(fill(one)) for one in self.path)
        return Known(
            name, str(fill(self.repo)), path, str(fill(self.model)), self.l0,
            fill(self.hookpoint), fill(self.target), self.transform,
            None if self.scale is None else float(str(fill(self.scale))),
        )  # fmt: skip

    def for_model(self, model: str) -> str | None:
        """The pattern's name for one model (its Hub id, or the last part of it); None if not its.

        >>> releases()[5].for_model("google/gemma-2-9b-it")
        'gemma-2-9b-it:gemma-scope-{site}-{width}/{layer}[/{l0}]'
        """
        prefix, _, rest = self.name.partition(":")
        keys = re.findall(r"\{(\w+)\}", prefix)
        for shorts in product(*(self.fields[key] for key in keys)):
            said = dict(zip(keys, shorts, strict=True))
            values = self._values(said)
            if values is not None and _last(self.model.format(**values)) == _last(model):
                return f"{_fill_optional(prefix, said)}:{rest}"
        return None

    def choices(self) -> str:
        """What may stand for the fields behind the model, as one line."""
        keys = re.findall(r"\{(\w+)\}", self.name.partition(":")[2])
        said = {key: [one for one in self.fields.get(key, {}) if one] for key in keys}
        if "layer" in said and not said["layer"] and self.layers:
            said["layer"] = [f"0 to {self.layers - 1}"]
        return "; ".join(f"{key}: {', '.join(some)}" for key, some in said.items() if some)

    def _regex(self) -> str:
        text = re.escape(self.name).replace(r"\{", "{").replace(r"\}", "}")
        text = text.replace(r"\[", "(?:").replace(r"\]", ")?")
        return re.sub(r"\{(\w+)\}", self._group, text)

    def _group(self, match: re.Match[str]) -> str:
        key = match[1]
        choices = [one for one in self.fields.get(key, {}) if one]
        # the longest first, so that 70m-deduped is not taken for 70m
        options = "|".join(map(re.escape, sorted(choices, key=len, reverse=True))) or r"\d+"
        return f"(?P<{key}>{options})"

    def _values(self, said: Mapping[str, str]) -> dict[str, str] | None:
        """How each field is spelled; None if a layer is beyond the model."""
        values: dict[str, str] = {}
        for key, short in said.items():
            short = short or self.default.get(key, "")
            choices = self.fields.get(key, {})
            values |= choices.get(short) or {key: short or "*"}
        layer = values.get("layer", "0")
        if self.layers is not None and layer.isdigit() and int(layer) >= self.layers:
            return None
        return values


def _fold(sae: SAE, scale: float) -> None:
    """x · scale into the weights, as SAELens folds it: b_enc belongs to the scaled inputs."""
    with torch.no_grad():
        sae.W_enc.mul_(scale)
        sae.W_dec.div_(scale)
        if sae.b_dec is not None:
            sae.b_dec.div_(scale)
    sae.train(sae.training)  # decoder norms that are kept


def _composed(transform: InputTransform, sae: SAE) -> InputTransform:
    """A transform before the scale that the files themselves give (Llama Scope)."""
    scale = sae.input_transform
    if isinstance(transform, UnitNorm) and isinstance(scale, DatasetScale):
        return UnitNorm(math.sqrt(sae.d_in) * scale.factor)
    if isinstance(scale, NoTransform):
        return transform
    raise ValueError(f"{sae.metadata['name']}: its files give {scale}, expected no transform")


def lookup(name: str) -> Known | None:
    """What a short name means; None if it is not the beginning of one.

    Raises ValueError if its model is in the registry but nothing of that name; says what is.
    """
    for release in releases():
        if (known := release.match(name)) is not None:
            return known
    model, colon, rest = name.partition(":")
    if not colon or not rest or "/" in model:
        return None
    of_model = [one for one in releases() if re.fullmatch(_prefix(one), model)]
    if not of_model:
        return None
    close = get_close_matches(name, [one.name for one in of_model], 3, 0.3)
    raise ValueError(
        f"{name}: no such short name; for {model} there is "
        f"{'; '.join(close or [one.name for one in of_model])}"
    )


def note(sae: SAE, repo: str) -> SAE:
    """Mark an SAE loaded by its repo's name if only a short name would transform its input."""
    told = [one.name for one in releases() if one.repo == repo and (one.transform or one.scale)]
    if told:
        sae.metadata["load_as"] = told[0]
    return sae


def releases() -> list[Release]:
    """The patterns of the registry."""
    return list(_read())


@cache
def _read() -> tuple[Release, ...]:
    text = (files("saert") / "hub" / "registry.toml").read_text(encoding="utf-8")
    return tuple(_release(entry) for entry in tomllib.loads(text)["release"])


def _release(entry: dict[str, Any]) -> Release:
    fields = {key: _spelled(key, choices) for key, choices in entry.pop("fields", {}).items()}
    return Release(**entry | {"path": tuple(entry["path"]), "fields": fields})


def _spelled(key: str, choices: list[str] | dict[str, Any]) -> dict[str, dict[str, str]]:
    if isinstance(choices, list):
        choices = {one: one for one in choices}
    return {short: one if isinstance(one, dict) else {key: one} for short, one in choices.items()}


def _fill_optional(name: str, said: Mapping[str, str]) -> str:
    """A name with its fields filled in, and without the [parts] whose field was left out."""
    for key, short in said.items():
        if not short:
            name = re.sub(rf"\[[^][]*{{{key}}}[^][]*\]", "", name)
        name = name.replace("{" + key + "}", short)
    return name.replace("[", "").replace("]", "")


def _last(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _prefix(release: Release) -> str:
    whole = replace(release, name=release.name.partition(":")[0])
    return whole._regex()


def _l0(path: str) -> float:
    found = re.search(r"average_l0_(\d+)", path)
    return float(found[1]) if found else float("inf")
