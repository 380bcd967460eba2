"""What one request asks of the attached SAEs, as plain data that crosses processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from saert.edits import Edit, LatentEdit, Op
from saert.hookpoint import Hookpoint
from saert.measure.steering.spec import EditSpec
from saert.sae import SAE

KEY = "saert"  # of a request's extra arguments
OPS: dict[Op, Literal["add", "clamp", "scale"]] = {
    Op.ADD: "add",
    Op.SET: "clamp",
    Op.SCALE: "scale",
}
FIELDS = ("edits", "splice", "codes", "key")
GivenEdit = EditSpec | Edit | Mapping[str, Any]


@dataclass(frozen=True)
class Attached:
    """One attached SAE, as those know it who do not hold it.

    Attributes:
        source: where it was loaded from.
        num_latents: the size of its dictionary.
        slots: how many edits of it one request may have.
        tag: told apart by it: the same source attached at another time may be another SAE.
    """

    source: str
    num_latents: int
    slots: int
    tag: str = ""


Catalogue = Mapping[str, Attached]  # by hookpoint


@dataclass(frozen=True)
class Directive:
    """What one request asks for.

    Attributes:
        edits: made in this order; `EditSpec.sae` is a source string or a hookpoint.
        splice: hookpoints where the reconstruction replaces the hidden state.
        codes: hookpoints whose codes are kept for the caller, filed under `key`.
    """

    edits: tuple[EditSpec, ...] = ()
    splice: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    key: str = ""

    @classmethod
    def parse(cls, given: object) -> Directive:
        """From a list of edits, a mapping of the fields, or the JSON text of either.

        Raises ValueError, TypeError: whatever is not one of these; names the value.
        """
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"{KEY}: not JSON ({error})") from None
        if isinstance(given, list | tuple):
            given = {"edits": given}
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{KEY}: found {type(given).__name__}, expected a list of edits, or a mapping with "
                "edits, splice and codes"
            )
        if unknown := [key for key in given if key not in FIELDS]:
            raise ValueError(f"{KEY}: unknown key {unknown[0]!r}; expected edits, splice, codes")
        key = given.get("key", "")
        if not isinstance(key, str):
            raise TypeError(f"{KEY}: key: found {type(key).__name__}, expected text")
        return cls(
            edits=specs(given.get("edits", ())),
            splice=_names("splice", given.get("splice", ())),
            codes=_names("codes", given.get("codes", ())),
            key=key,
        )

    @property
    def empty(self) -> bool:
        """Whether it asks for nothing."""
        return not (self.edits or self.splice or self.codes)

    @property
    def changes(self) -> bool:
        """Whether it changes the model: codes alone do not."""
        return bool(self.edits or self.splice)

    @property
    def names(self) -> frozenset[str]:
        """Every SAE that it names."""
        return frozenset((*(spec.sae for spec in self.edits), *self.splice, *self.codes))

    def after(self, first: Directive) -> Directive:
        """`first`'s wishes, then these."""
        return replace(
            self,
            edits=first.edits + self.edits,
            splice=tuple(dict.fromkeys(first.splice + self.splice)),
            codes=tuple(dict.fromkeys(first.codes + self.codes)),
        )

    def resolved(self, catalogue: Catalogue) -> Directive:
        """The same wishes, every SAE named by its hookpoint.

        Raises ValueError: an SAE that is not attached, a latent that it does not have, more edits
        than it has slots for.
        """
        edits = tuple(replace(spec, sae=find(spec.sae, catalogue)) for spec in self.edits)
        for spec in edits:
            there = catalogue[spec.sae].num_latents
            latent = max(spec.latent, -1 if spec.when is None else spec.when)
            if latent >= there:
                raise ValueError(
                    f"{KEY}: latent {latent} does not exist; the SAE at {spec.sae} has {there} "
                    f"latents, 0 to {there - 1}"
                )
        for name, sae in catalogue.items():
            wanted = sum(spec.sae == name for spec in edits)
            if wanted > sae.slots:
                raise ValueError(
                    f"{KEY}: {wanted} edits at {name}, but a request has {sae.slots} slots there; "
                    "attach with more slots"
                )
        return replace(
            self,
            edits=edits,
            splice=tuple(dict.fromkeys(find(name, catalogue) for name in self.splice)),
            codes=tuple(dict.fromkeys(find(name, catalogue) for name in self.codes)),
        )

    def at(self, name: str) -> tuple[EditSpec, ...]:
        """The edits of one hookpoint, of a resolved directive."""
        return tuple(spec for spec in self.edits if spec.sae == name)

    def salt(self, given: str | None, prompt_length: int, catalogue: Catalogue) -> str | None:
        """What keeps a prefix cache from handing this request's keys to others, or theirs to it.

        Requests share keys if they have the same salt and the same tokens. So the salt names
        whatever the keys depend on: the edits, the SAEs, and the prompt's length where an edit
        looks at it. A request that changes nothing keeps its own salt.
        """
        if not self.changes:
            return given
        phased = any(spec.phase != "all" for spec in self.edits)
        used = {name: catalogue[name] for name in self.names}
        facts = {
            "edits": [spec.to_dict() for spec in self.edits],
            "splice": sorted(self.splice),
            "saes": {name: (sae.source, sae.tag) for name, sae in used.items()},
            "prompt": prompt_length if phased else None,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{given or ''}|saert:{digest[:32]}"

    def to_data(self) -> dict[str, Any]:
        """Plain data, for JSON; `parse` reads it."""
        return {
            "edits": [spec.to_dict() for spec in self.edits],
            "splice": list(self.splice),
            "codes": list(self.codes),
            "key": self.key,
        }


def find(name: str, catalogue: Catalogue) -> str:
    """The hookpoint of an SAE that is called by hookpoint, in any spelling, or by source."""
    if name in catalogue:
        return name
    matching = [at for at, sae in catalogue.items() if sae.source == name]
    if len(matching) == 1:
        return matching[0]
    try:
        spelled = str(Hookpoint.parse(name))
    except ValueError:
        spelled = ""
    if spelled in catalogue:
        return spelled
    known = ", ".join(f"{at} ({sae.source})" for at, sae in catalogue.items()) or "none"
    raise ValueError(f"{KEY}: no SAE {name!r} is attached here; attached: {known}")


def specs(edits: object) -> tuple[EditSpec, ...]:
    """Edits as plain data: from specs, from mappings, or from what `saert.add` and others return.

    Raises ValueError for an edit that plain data cannot hold: a vector, rows, positions.
    """
    if isinstance(edits, EditSpec | LatentEdit | Mapping):
        edits = [edits]
    if not isinstance(edits, Iterable) or isinstance(edits, str | bytes):
        raise TypeError(f"{KEY}: edits: found {type(edits).__name__}, expected a list of edits")
    return tuple(spec for one in edits for spec in _spec(one))


def _spec(one: object) -> Sequence[EditSpec]:
    if isinstance(one, EditSpec):
        return [one]
    if isinstance(one, Mapping):
        return [EditSpec.from_dict(one)]
    if not isinstance(one, LatentEdit):
        raise TypeError(
            f"{KEY}: found {type(one).__name__}, expected an EditSpec, a mapping with its fields, "
            "or an edit of latents"
        )
    select = one.select
    if select.rows is not None or select.positions is not None:
        raise ValueError(
            f"{KEY}: {one!r} selects rows or positions; a request takes edits by phase and `when`"
        )
    sae = select.sae.hookpoint if isinstance(select.sae, SAE) else select.sae
    if sae is None:
        raise ValueError(f"{KEY}: {one!r} does not say which SAE; add sae=…")
    when = select.when
    return [
        EditSpec(
            sae=str(sae),
            latent=latent,
            op=OPS[one.op],
            amount=float(one.amount),
            phase=select.phase,
            when=None if when is None else when.latent,
            above=0.0 if when is None else when.above,
        )
        for latent in one.latents
    ]


def _names(field: str, given: object) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{KEY}: {field}: found {given!r}, expected a list of hookpoints")
    return tuple(names)
