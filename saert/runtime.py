"""attach: put SAEs onto a live model; observe, splice and edit; take them off again.

A hook per attached SAE reads the hidden state at its hookpoint, encodes it if anyone wants the
code, and returns `edit(hidden, sae, plan)` (`saert.plan`) if there is something to change. With
nothing to change it returns nothing, and the model is bit for bit itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from saert.compat import check_model
from saert.edits import Edit, LatentEdit, VectorEdit
from saert.hookpoint import Hookpoint, HookpointError, Location
from saert.record import Codes, SAEReport
from saert.sae import SAE
from saert.static import StaticTap
from saert.tap import Record, Tap
from saert.tracker import Tracker, no_copy

Source = SAE | str
Places = bool | str | Hookpoint | Iterable[str | Hookpoint]
_loader: Callable[[str], SAE] | None = None


def set_loader(loader: Callable[[str], SAE]) -> None:
    """Let `attach` take source strings. Called by saert.hub, which this floor cannot import."""
    global _loader
    _loader = loader


def attach(
    model: nn.Module,
    saes: Source | Sequence[Source] | Mapping[str | Hookpoint, Source],
    edits: Edit | Iterable[Edit] = (),
    *,
    splice: Places = False,
    refine: Places = False,
    record: Record = "last",
    hookpoint: str | Hookpoint | None = None,
    strict: bool = True,
    compiled: bool = False,
) -> Attachment:
    """Put SAEs onto a model. Live when it returns, until `detach()` or the end of a `with` block.

    Args:
        model: any transformers model (also PEFT-wrapped, compiled, quantised or sharded), or any
            nn.Module for SAEs whose hookpoint is a module path.
        saes: an SAE, a source string "repo:path", a sequence of them, or {hookpoint: SAE}. Several
            may share a hookpoint; they apply in this order, each on what the previous one left.
        edits: `add`, `clamp`, `scale`, `ablate`, `add_vector`; applied in list order.
        splice: True, or the hookpoints where the reconstruction replaces the hidden state. Without
            it the SAE's error is kept, and only the difference that edits make is added.
        refine: True, or the hookpoints where activations are refitted to what the SAE should write,
            on the latents that the encoder chose (`saert.refine`): such codes are what is recorded,
            what edits and conditions read, and with `splice` what the reconstruction is made of.
        record: "last" keeps the codes of the latest forward pass, "all" those of every token since
            attach, False none: an SAE that no edit reads is then not even encoded.
        hookpoint: where to put a single SAE that does not say, or against what it says.
        strict: refuse an SAE whose metadata names another model.
        compiled: for a model that is, or will be, compiled: edits can be assigned without compiling
            again (`saert.static`). Refuses record="all", and recording codes of variable width.

    Raises:
        HookpointError, ValueError, TypeError: a hookpoint the model does not have, a width that
            does not fit, an SAE for another model, an edit that cannot be meant. The model is left
            exactly as it was.

    >>> with attach(model, sae, [add(3, 8.0), ablate(5)]) as attachment:
    ...     output = model.generate(**inputs, max_new_tokens=20)
    >>> attachment.codes["resid_post.2"]  # [batch, sequence, k], of the latest pass
    SparseCode(1x1 tokens, k=16, num_latents=1024)
    """
    attachment = Attachment(model, _resolve(saes, hookpoint), record, strict, compiled)
    try:
        attachment.splice = splice
        attachment.refine = refine
        attachment.edits = edits
        attachment._go_live()
    except BaseException:
        attachment.detach()
        raise
    return attachment


class Attachment:
    """SAEs on a model: their codes, their edits, and the way off again. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        saes: list[tuple[Hookpoint, SAE]],
        record: Record,
        strict: bool,
        compiled: bool = False,
    ) -> None:
        if record not in (False, "last", "all"):
            raise ValueError(f"record: found {record!r}, expected False, 'last' or 'all'")
        self._closed = False
        self._edits: tuple[Edit, ...] = ()
        self._spliced: tuple[Hookpoint, ...] = ()
        self._refined: tuple[Hookpoint, ...] = ()
        self._tracker: Tracker | None = None
        self._model, self.compiled = model, compiled
        for at, sae in saes:
            check_model(model, sae, at, strict)
            if compiled and not sae.whole:
                raise ValueError(
                    f"{at}: compiled=True needs a whole SAE, found one in shards; attach without it"
                )
        make = StaticTap if compiled else Tap
        self._taps = [make(model, at, sae, record) for at, sae in saes]
        self.codes = Codes(
            [tap.hookpoint for tap in self._taps],
            lambda key: [tap.recorder for tap in self._named(key, "codes")],
        )
        """Codes seen, by hookpoint in any spelling (or by SAE): SparseCode [batch, sequence, k].
        Padding tokens have empty codes."""

    # -- life ----------------------------------------------------------------------------------

    def _go_live(self) -> None:
        tracker = Tracker.of(self._model, self)
        self._tracker = tracker
        for tap in self._taps:
            tap.go_live(tracker)
        _forget_compiled()

    def detach(self) -> None:
        """Restore the model exactly. Recorded codes and the report stay readable."""
        if self._closed:
            return
        self._closed = True
        for tap in self._taps:
            tap.remove()
        if self._tracker is not None:
            self._tracker.release(self)
            _forget_compiled()

    def __enter__(self) -> Attachment:
        self._check_open("enter")
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # -- live state ----------------------------------------------------------------------------

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in force. Assign an edit or a sequence of them; the next pass obeys."""
        return self._edits

    @edits.setter
    def edits(self, edits: Edit | Iterable[Edit]) -> None:
        self._check_open("assign edits to")
        chosen = _edit_list(edits)
        owners = [self._owner(one) for one in chosen]
        for tap in self._taps:
            tap.check_edits([e for e, owner in zip(chosen, owners, strict=True) if owner is tap])
        changed = [
            tap.set_edits([e for e, owner in zip(chosen, owners, strict=True) if owner is tap])
            for tap in self._taps
        ]
        self._edits = chosen
        if any(changed):
            self._changed()

    @property
    def splice(self) -> tuple[Hookpoint, ...]:
        """Where the reconstruction replaces the hidden state. Assign as in `attach`."""
        return self._spliced

    @splice.setter
    def splice(self, where: Places) -> None:
        self._check_open("splice")
        taps = self._at(where, "splice")
        for tap in self._taps:
            tap.splice = tap in taps
        self._spliced = tuple(dict.fromkeys(tap.hookpoint for tap in taps))
        self._changed()

    @property
    def refine(self) -> tuple[Hookpoint, ...]:
        """Where activations are refitted. Assign as in `attach`; the next pass obeys."""
        return self._refined

    @refine.setter
    def refine(self, where: Places) -> None:
        self._check_open("refine")
        taps = self._at(where, "refine")
        if parts := [str(tap.hookpoint) for tap in taps if not tap.sae.whole]:
            raise ValueError(f"{parts[0]}: refine needs a whole SAE, found one in shards")
        for tap in self._taps:
            tap.refine = tap in taps
        self._refined = tuple(dict.fromkeys(tap.hookpoint for tap in taps))
        self._changed()

    def report(self) -> dict[str, SAEReport]:
        """Per hookpoint: tokens, L0, FVU, error norm and milliseconds, since attach or `clear`.

        FVU = Σ‖y - ŷ‖² / Σ‖y - ȳ‖² over the tokens seen (Gao et al. 2024), as the SAE's own input
        (a transcoder's: its target) stood before its edits; padding is left out. The error norm is
        the mean of ‖y - ŷ‖₂. L0, FVU and error norm are None with `record=False`, and of the
        refined code where `refine` is on.
        """
        names = [str(tap.hookpoint) for tap in self._taps]
        keys = [
            name if names.count(name) == 1 else f"{name}#{names[:i].count(name)}"
            for i, name in enumerate(names)
        ]
        return {key: tap.recorder.report() for key, tap in zip(keys, self._taps, strict=True)}

    def clear(self) -> None:
        """Forget recorded codes and statistics."""
        for tap in self._taps:
            tap.recorder.clear()

    def __repr__(self) -> str:
        places = ", ".join(str(tap.hookpoint) for tap in self._taps)
        state = "detached" if self._closed else f"{len(self._edits)} edits"
        return f"Attachment({places}; {state})"

    # -- helpers -------------------------------------------------------------------------------

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise RuntimeError(f"cannot {verb} a detached attachment; call attach again")

    def _changed(self) -> None:
        if self._tracker is not None:
            _forget_compiled()

    def _at(self, where: Places, who: str) -> list[Tap]:
        if isinstance(where, bool):
            return list(self._taps) if where else []
        names = [where] if isinstance(where, str | Hookpoint) else list(where)
        return [tap for name in names for tap in self._named(name, who)]

    def _owner(self, one: Edit) -> Tap:
        which = one.select.sae
        places = ", ".join(str(tap.hookpoint) for tap in self._taps)
        if which is None:
            if len(self._taps) == 1:
                return self._taps[0]
            raise ValueError(
                f"{one!r}: {len(self._taps)} SAEs are attached ({places}); say which one with sae="
            )
        found = self._named(which, repr(one))
        if len(found) > 1:
            how = "name the hookpoint" if isinstance(which, SAE) else "pass the SAE itself"
            raise ValueError(f"{one!r}: sae= means {len(found)} attached SAEs; {how} instead")
        return found[0]

    def _named(self, which: SAE | Hookpoint | str, who: str) -> list[Tap]:
        if isinstance(which, SAE):
            found = [tap for tap in self._taps if tap.sae is which]
            what = "that SAE"
        else:
            wanted = Hookpoint.parse(which)
            found = [tap for tap in self._taps if tap.hookpoint == wanted]
            if not found:  # another spelling of the same tensor
                location = _locate(wanted, self._model)
                found = [tap for tap in self._taps if location and tap.read == location]
            what = str(wanted)
        if not found:
            places = ", ".join(str(tap.hookpoint) for tap in self._taps)
            raise ValueError(f"{who}: {what} is not attached; attached: {places}")
        return found

    def refuse_batching(self) -> str | None:
        """Which edit `generate_batch` could not honour, if any."""
        for one in self._edits:
            if one.select.rows is not None:
                return f"{one!r} selects rows"
            if one.select.needs_prompt:
                return f"{one!r} needs to know where each prompt ends"
        return None

    def refuse_embeds(self) -> None:
        """Raise if an SAE sits on the token embedding, which a call with embeddings never runs."""
        for tap in self._taps:
            if isinstance(tap.read.module, nn.Embedding):
                raise ValueError(
                    f"{tap.hookpoint}: the model was called with inputs_embeds, so its token "
                    "embedding never runs; attach at resid_pre.0, or call it with input_ids"
                )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise no_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise no_copy()


def _resolve(
    saes: Source | Sequence[Source] | Mapping[str | Hookpoint, Source],
    hookpoint: str | Hookpoint | None,
) -> list[tuple[Hookpoint, SAE]]:
    if isinstance(saes, Mapping):
        if hookpoint is not None:
            raise ValueError("hookpoint= is for a single SAE; a mapping names its hookpoints")
        return [(Hookpoint.parse(at), _load(source)) for at, source in saes.items()]
    sources = [saes] if isinstance(saes, SAE | str) else list(saes)
    if not sources:
        raise ValueError("attach: no SAE given")
    if hookpoint is not None and len(sources) > 1:
        raise ValueError(f"hookpoint= is for a single SAE, found {len(sources)}; pass a mapping")
    found = []
    for sae in map(_load, sources):
        at = sae.hookpoint if hookpoint is None else Hookpoint.parse(hookpoint)
        if at is None:
            raise ValueError(_homeless(sae))
        found.append((at, sae))
    return found


def _homeless(sae: SAE) -> str:
    name = sae.metadata.get("hook_name")
    if name is None:
        return "the SAE does not say where it reads; pass hookpoint=, as resid_post.6"
    try:
        Hookpoint.parse(str(name))
    except HookpointError as error:
        return f"the SAE reads {name!r}: {error}; then pass it as hookpoint="
    return f"the SAE was made without a hookpoint; its metadata says {name!r}: pass hookpoint="


def _load(source: Source) -> SAE:
    if isinstance(source, SAE):
        return source
    if not isinstance(source, str):
        raise TypeError(
            f"attach: found {type(source).__name__}, expected an SAE or a source string"
        )
    if _loader is None:
        raise RuntimeError("source strings need saert.hub: import saert, not saert.runtime alone")
    return _loader(source)


def _edit_list(edits: Edit | Iterable[Edit]) -> tuple[Edit, ...]:
    chosen = (edits,) if isinstance(edits, LatentEdit | VectorEdit) else tuple(edits)
    for one in chosen:
        if not isinstance(one, LatentEdit | VectorEdit):
            raise TypeError(
                f"edits: found {type(one).__name__}, expected add, clamp, scale, ablate or "
                "add_vector"
            )
    return chosen


def _locate(at: Hookpoint, model: nn.Module) -> Location | None:
    try:
        return at.resolve(model)
    except HookpointError:
        return None


def _forget_compiled() -> None:
    """Drop compiled graphs: those made without our hooks would go on ignoring them.

    torch.compile does not guard on the emptiness of a module's hooks, so a graph from before
    `attach` runs unsteered, and one that holds an edit would run steered after it is gone.
    Where nothing was compiled this takes a quarter of a millisecond.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
