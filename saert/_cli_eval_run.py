"""What `saert eval` does: measure SAEs on text, and keep what was measured in a folder.

    FOLDER/eval.json   facts, and one entry for each SAE
           eval.html   the same as a page

`eval.json` is replaced as a whole after each group of SAEs. An SAE whose weights and settings have
an entry already is not measured again, so a stopped evaluation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from saert._cli_text import Text
from saert.compat import check_model
from saert.hooks import device_of
from saert.hub.identity import bytes_of, describe_sae, digest, fingerprint
from saert.hub.session import Loaded, Session, UserError
from saert.measure.passes import sites
from saert.measure.reports.compute import LossLaw, compute_equivalent, fit_losses
from saert.measure.reports.downstream import measure
from saert.measure.reports.html import render
from saert.measure.reports.transfer import TransferReport

RESULTS, PAGE = "eval.json", "eval.html"
MEASURES = 1  # counted up when a number's definition changes: older entries are measured again
AT_ONCE = 8  # SAEs that share passes, and are saved together
LAW = ("a", "b", "c", "low", "high", "whole", "compute", "loss")  # what --scaling may hold
SAMPLE = 64  # entries of each of a model's tensors that its fingerprint looks at


@dataclass(frozen=True)
class Evaluation:
    """A session's SAEs on some text; `tuned`: (name, model) to measure them on as well."""

    session: Session
    text: Text
    tuned: tuple[str, Any] | None = None
    batch: int = 16

    def identity(self) -> dict[str, Any]:
        """What all entries of a folder share; JSON."""
        rows, special = self.text.rows, self.text.special(self.text.rows)
        said = hashlib.sha256()
        for part in (rows, special):
            said.update(bytes_of(part))
        return {
            "measures": MEASURES,
            "model": _about(self.session.name, self.session.model),
            "tuned": None if self.tuned is None else _about(*self.tuned),
            "text": {
                "source": self.text.source,
                "rows": rows.shape[0],
                "context": rows.shape[1],
                "tokens": rows.numel(),
                "special": int(special.sum()),
                "sha256": said.hexdigest(),
            },
        }

    def folder(self) -> Path:
        """Where results go unless told otherwise: another folder for another model or text."""
        text = json.dumps(self.identity(), sort_keys=True)
        model = Path(self.session.name).name
        return Path(f"eval-{model}-{hashlib.sha256(text.encode()).hexdigest()[:6]}")

    def run(self, out: Path, scaling: Path | None = None, progress: bool = True) -> dict[str, Any]:
        """Measure what is not in the folder yet, write both files, return the first's content."""
        law = None if scaling is None else read_scaling(scaling)
        for one in self.session.saes:
            check_model(self.session.model, one.sae, sites(one.sae)[0], self.session.strict)
        identity = self.identity()
        found = {entry["fingerprint"]: entry for entry in _before(out, identity)}
        wanted = {fingerprint(one.sae): one for one in self.session.saes}
        out.mkdir(parents=True, exist_ok=True)

        def result() -> dict[str, Any]:
            order = [key for key in wanted if key in found]
            saes = [found[key] for key in [*order, *(k for k in found if k not in wanted)]]
            facts = identity | self._circumstances() | {"scaling": law and law[1]}
            content: dict[str, Any] = _finite({"facts": facts, "saes": _named(saes)})
            return content

        missing = sorted((k for k in wanted if k not in found), key=lambda k: _place(wanted[k]))
        for i in range(0, len(missing), AT_ONCE):
            keys = missing[i : i + AT_ONCE]
            entries = self._measure([wanted[key] for key in keys], progress)
            found |= {k: e | {"fingerprint": k} for k, e in zip(keys, entries, strict=True)}
            write(out / RESULTS, result())
        for entry in found.values():
            entry["compute_equivalent"] = law and _equivalent(entry["downstream"], *law[0])
        final = result()
        write(out / RESULTS, final)
        write(out / PAGE, render(final))
        return final

    def _measure(self, group: Sequence[Loaded], progress: bool) -> list[dict[str, Any]]:
        saes = [one.sae for one in group]
        models = [self.session.model] + ([] if self.tuned is None else [self.tuned[1]])
        home = [sae.device for sae in saes]
        for sae in saes:
            sae.to(device_of(self.session.model))
        options: dict[str, Any] = {"batch": self.batch, "special": self.text.special}
        base, *tuned = (
            measure(model, saes, self.text.rows, progress=progress, **options) for model in models
        )
        for sae, device in zip(saes, home, strict=True):
            sae.to(device)
        entries = []
        for i, one in enumerate(group):
            entry = describe(one) | base[i].to_dict() | {"tuned": None, "difference": None}
            for found in tuned:
                entry["tuned"] = found[i].to_dict()
                entry["difference"] = TransferReport(base[i], found[i]).difference
            entries.append(entry)
        return entries

    def _circumstances(self) -> dict[str, Any]:
        """What is recorded but decides nothing."""
        return {
            "device": str(device_of(self.session.model)),
            "versions": {
                "saert": version("saert"),
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "Python": platform.python_version(),
            },
            "command": shlex.join(["saert", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def describe(one: Loaded) -> dict[str, Any]:
    """What an SAE is, in an entry."""
    where = {"source": one.source, "revision": one.sae.metadata.get("revision")}
    return where | describe_sae(one.sae)


def read_scaling(path: Path) -> tuple[tuple[LossLaw, float | None], str]:
    """The law of `--scaling` with the model's own compute, if given, and the law in words.

    A JSON object: {"a", "b", "c"} with optional "low" and "high", or {"compute": […], "loss": […]};
    either with an optional "whole"."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--scaling {path}: no JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    for key, value in content.items():
        if key in LAW and not _numbers(value, several=key in ("compute", "loss")):
            what = "a list of numbers" if key in ("compute", "loss") else "a number"
            raise UserError(f"--scaling {path}: {key} is {json.dumps(value)}, expected {what}")
    whole = content.pop("whole", None)
    if set(content) == {"compute", "loss"}:
        law = fit_losses(content["compute"], content["loss"])
        source = f"fitted to {len(content['loss'])} models, rms {law.rms:.2g} nats"
    elif {"a", "b", "c"} <= set(content) <= {"a", "b", "c", "low", "high"}:
        law, source = LossLaw(**content), "given"
    else:
        raise UserError(
            f"--scaling {path}: found {', '.join(content) or 'no object'}; expected a, b, c (and "
            "low, high), or compute and loss; and, if known, whole"
        )
    return (law, whole), f"a = {law.a:.4g}, b = {law.b:.4g}, c = {law.c:.4g} ({source})"


def _numbers(value: Any, several: bool) -> bool:
    """Whether JSON is a number, or a list of them."""
    found = value if several and isinstance(value, list) else [value]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) for n in found)
    return plain and isinstance(value, list) == several


def write(path: Path, content: Mapping[str, Any] | str) -> None:
    """All or nothing: a kill leaves the file as it was, or as it should be."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _before(out: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of an earlier evaluation of the same model and text."""
    path = out / RESULTS
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        facts, entries = before["facts"], list(before["saes"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is no evaluation; choose another --out") from None
    if facts.get("measures") != MEASURES:
        return []
    other = [key for key, value in identity.items() if facts.get(key) != value]
    if other:
        raise UserError(
            f"{out} holds an evaluation with another {' and '.join(other)}; choose another --out"
        )
    return entries


def _equivalent(losses: Mapping[str, Any], law: LossLaw, whole: float | None) -> dict[str, Any]:
    spliced, model = losses["ce_spliced"], losses["ce"]
    given = {"model_loss": model} if whole is None else {"whole": whole}
    try:
        return {"fraction": compute_equivalent(spliced, law, **given), "refused": None}
    except ValueError as refusal:
        return {"fraction": None, "refused": str(refusal)}


def _named(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with the shortest name that is its own: its hookpoints, or its source."""
    short = [
        entry["hookpoint"] + (f" → {target}" if (target := entry["target_hookpoint"]) else "")
        for entry in entries
    ]
    return [
        entry | {"name": name if short.count(name) == 1 else entry["source"]}
        for name, entry in zip(short, entries, strict=True)
    ]


def _place(one: Loaded) -> str:
    return str(sites(one.sae)[1])


def _about(name: str, model: Any) -> dict[str, Any]:
    return {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "fingerprint": digest(model, SAMPLE),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
