"""The model card: YAML that the Hub reads, and a text between two marks that is rewritten.

What stands outside of the marks is its owner's, and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from html import escape
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from saert.hub import bundled
from saert.hub.publishing.entry import Entry
from saert.hub.publishing.plots import DENSITY, MEASURED

BEGIN = "<!-- saert: begin. `saert publish` writes what follows; write above or below it. -->"
END = "<!-- saert: end -->"
MARKS = re.compile(r"<!-- saert: (begin|end)\b[^>]*-->")
HEADER = re.compile(r"\s*^---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.S | re.M)
TAGS = ["sparse-autoencoder", "interpretability", "saert"]
RESULTS = {
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token (L0)",
    "dead": "latents that never fire, fraction",
    "ce_recovered": "cross-entropy recovered, fraction",
}
MEANING = """\
FVU: fraction of variance unexplained. L0: active latents per token. Dead: latents that never \
exceed 1e-3 in these tokens. CE recovered: (CE of zeros − CE spliced) / (CE of zeros − CE of the \
model), cross-entropy in nats per token; 100% if nothing is lost. Every number was measured; – \
stands for what was not."""
LIMITATIONS = """\
- They fit the activations of {base_model} at the places named above, and of no other model.
- The numbers hold for the text they were measured on; other text, and longer contexts than in \
training, can be worse. A latent that fired nowhere in that text may fire elsewhere.
- What a reconstruction leaves out is still used by the model: splicing it in changes predictions \
(CE recovered). saert's edits keep that error.
- A low FVU does not say that latents mean one thing each; what they stand for has to be looked at.
"""


def render(
    entries: Mapping[str, Entry],
    repo_id: str,
    *,
    before: str = "",
    previous: Mapping[str, Entry] | None = None,
    title: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    plots: Collection[str] = (),
    unmeasured: str = "No measurements were published with these SAEs.",
) -> str:
    """The README.md of a repo.

    Args:
        entries: by path in the repo; at least one, all of the same base model.
        before: the README.md that is there: its keys and its text outside of the marks stay.
        previous: the SAEs that `before` was made for: what they put into its keys is taken out.
        title: of a new card; default: the repo's name.
        license: as the Hub spells it; None keeps what is there.
        revision: the branch, if it is not the one that is loaded by default.
        plots: which of the pictures are there.
        unmeasured: what stands for the numbers where there are none.

    Raises ValueError if `before` has metadata that cannot be read, or its marks are not one begin
    and one end.
    """
    try:
        old, text = _parts(before)
        data = _data(entries, repo_id, _without(old, previous or {}), license)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{repo_id}: the metadata of its README.md: {error}") from None
    block = "\n".join([BEGIN, _block(entries, repo_id, revision, plots, unmeasured), END])
    text = text.strip() if before.strip() else f"# {title or repo_id.rpartition('/')[2]}"
    marks = list(MARKS.finditer(text))
    if not marks:
        text = f"{text}\n\n{block}".lstrip()
    elif [mark[1] for mark in marks] == ["begin", "end"]:
        text = text[: marks[0].start()] + block + text[marks[1].end() :]
    else:
        raise ValueError(
            f"{repo_id}: its README.md has the marks {[mark[0] for mark in marks]}; expected one "
            f"begin and, below it, one {END!r}, between which saert writes: put them back there, "
            "or delete all of them and what stands between"
        )
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def _without(old: dict[str, Any], previous: Mapping[str, Entry]) -> dict[str, Any]:
    """A card's keys as its owner wrote them, without what earlier SAEs added."""
    added: dict[str, set[str | None]] = {
        "base_model": {entry.base_model for entry in previous.values()},
        "datasets": {entry.dataset for entry in previous.values()},
        "tags": {"transcoder"} if any(e.target_hookpoint for e in previous.values()) else set(),
    }
    kept = {
        key: [one for one in _joined(old[key], []) if one not in added[key]]
        for key in added
        if old.get(key)
    }
    return old | kept


def _data(
    entries: Mapping[str, Entry], repo_id: str, old: dict[str, Any], license: str | None
) -> ModelCardData:
    """The YAML: `old` with our keys set, lists joined."""
    some = next(iter(entries.values()))
    transcoder = ["transcoder"] if any(e.target_hookpoint for e in entries.values()) else []
    own = [
        result
        for path, entry in entries.items()
        for key in RESULTS
        if (result := _result(path, entry, key)) is not None
    ]
    kept = ModelCardData(**{"model-index": old["model-index"]}) if old.get("model-index") else None
    theirs = [
        one
        for one in (kept.eval_results or [] if kept else [])
        if "sae" not in (one.metric_args or {})
    ]
    datasets = _joined(old.get("datasets"), [e.dataset for e in entries.values() if e.dataset])
    base = _joined(old.get("base_model"), [some.base_model])
    known: dict[str, Any] = {"library_name": "saert", "license": license or old.get("license")}
    known |= {"base_model": base[0] if len(base) == 1 else base}
    known |= {"tags": _joined(old.get("tags"), [*TAGS, *transcoder])}
    known |= {"datasets": datasets or None, "eval_results": theirs + own or None}
    name = (kept.model_name if kept and theirs else None) or repo_id.rpartition("/")[2]
    ours = {*known, "model-index", "model_name"}
    rest = {key: value for key, value in old.items() if key not in ours}
    return ModelCardData(**known, **rest, model_name=name if own or theirs else None)


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """A README.md's metadata and its text."""
    found = HEADER.match(card)
    if found is None:
        return {}, card
    data = yaml.safe_load(found[1])
    if not isinstance(data, dict | None):
        raise ValueError(f"found a {type(data).__name__}, expected keys and values")
    return data or {}, card[found.end() :]


def _result(path: str, entry: Entry, key: str) -> EvalResult | None:
    value = entry.number(key)
    if value is None:
        return None
    on = entry.measured_on
    return EvalResult(
        task_type="feature-extraction",
        task_name="Sparse coding of activations",
        dataset_type=entry.dataset if on and entry.dataset and entry.dataset in on else "text",
        dataset_name=on or "text not recorded",
        metric_type=key,
        metric_name=f"{path}: {RESULTS[key]}",
        metric_value=value,
        metric_args={"sae": path},
    )


def _block(
    entries: Mapping[str, Entry],
    repo_id: str,
    revision: str | None,
    plots: Collection[str],
    unmeasured: str,
) -> str:
    some = next(iter(entries.values()))
    many = len(entries) > 1
    parts = [
        f"{len(entries) if many else 'A'} sparse "
        f"{_kind(entries.values())}{'s' if many else ''} of the activations of "
        f"{_model(some.base_model)}, for saert.",
        _table(entries),
        f"## Use\n\n```python\n{usage(entries, repo_id, revision)}```" + _peers(entries, repo_id),
        f"## Measured\n\n{_measured(entries, plots, unmeasured)}",
        f"## Training\n\n{_training(entries)}",
        f"## Limitations\n\n{LIMITATIONS.format(base_model=some.base_model)}",
    ]
    return "\n\n".join(part.strip() for part in parts)


def _kind(entries: Collection[Entry]) -> str:
    transcoders = sum(entry.target_hookpoint is not None for entry in entries)
    if not 0 < transcoders < len(entries):
        return "transcoder" if transcoders else "autoencoder"
    return "autoencoders and transcoder"


def _model(name: str) -> str:
    if "/" not in name or name == bundled.BASE_MODEL:
        return f"`{name}`"
    return f"[{name}](https://huggingface.co/{name})"


def _table(entries: Mapping[str, Entry]) -> str:
    head = ["SAE", "reads", "writes", "latents", "width", "activation", "FVU", "L0", "dead",
            "CE recovered", "tokens"]  # fmt: skip
    rows = []
    for path, e in entries.items():
        width = str(e.d_in) if e.d_in == e.d_out else f"{e.d_in} → {e.d_out}"
        written = f"`{e.target_hookpoint}`" if e.target_hookpoint else ""
        numbers = [_show(e.number("fvu"), ".4f"), _show(e.number("l0"), ".1f")]
        numbers += [_show(e.number(key), ".1%") for key in ("dead", "ce_recovered")]
        rows.append(
            [f"`{path}`", f"`{e.hookpoint}`", written, f"{e.num_latents:,}", width,
             _plain(e.activation), *numbers, _show(e.number("tokens"), ",.0f")]
        )  # fmt: skip
    used = [i for i, name in enumerate(head) if any(row[i] for row in rows) or name == "SAE"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)


def usage(entries: Mapping[str, Entry], repo_id: str, revision: str | None = None) -> str:
    """Python that loads the first SAE and attaches it to its model."""
    path, entry = next(iter(entries.items()))
    more = "" if revision is None else f', revision="{revision}"'
    model, imports = (
        entry.base_model,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    )
    made = (
        f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model}")'
    )
    if model == bundled.BASE_MODEL:
        imports = "from saert.hub import bundled"
        made = "model, tokenizer = bundled.model(), bundled.tokenizer()"
    return f"""\
from saert import attach, load
{imports}

{made}
sae = load("{repo_id}", "{path}"{more})
with attach(model, sae) as attachment:
    model(**tokenizer("Once upon a time", return_tensors="pt"))
    print(attachment.codes["{entry.hookpoint}"])
"""


def _peers(entries: Mapping[str, Entry], repo_id: str) -> str:
    """How other libraries read them."""
    lines = {
        "saelens": 'SAELens reads {it}: `SAE.from_pretrained("{repo}", "{path}")`.',
        "sparsify": 'sparsify reads {it}: `SparseCoder.load_from_hub("{repo}", "{path}")`.',
    }
    found = []
    for layout, line in lines.items():
        paths = [path for path, entry in entries.items() if entry.layout == layout]
        if paths:
            shown = ", ".join(f"`{path}`" for path in paths)
            it = "them too" if len(paths) == len(entries) > 1 else "it too"
            it = it if len(paths) == len(entries) else shown
            found.append("\n\n" + line.format(it=it, repo=repo_id, path=paths[0]))
    return "".join(found)


def _measured(entries: Mapping[str, Entry], plots: Collection[str], unmeasured: str) -> str:
    measured = {path: entry for path, entry in entries.items() if entry.metrics is not None}
    if not measured:
        return unmeasured
    texts = dict.fromkeys(entry.measured_on for entry in measured.values())
    parts = [
        "Measured on " + "; ".join(_plain(t or "text that was not recorded") for t in texts) + "."
    ]
    parts.append(MEANING)
    losses = [
        f"| `{path}` | {_show(e.number('ce'), '.3f')} | {_show(e.number('ce_spliced'), '.3f')} | "
        f"{_show(e.number('ce_zero'), '.3f')} | {_show(e.number('kl_spliced'), '.4f')} | "
        f"{_show(e.number('kl_recovered'), '.1%')} |"
        for path, e in measured.items()
        if e.number("ce") is not None
    ]
    if losses:
        head = "| SAE | CE of the model | CE spliced | CE of zeros | KL spliced | KL recovered |"
        parts.append("\n".join([head, "| --- " * 6 + "|", *losses]))
    says = {
        MEASURED: "The SAEs side by side: FVU, L0, CE recovered, dead latents",
        DENSITY: "How often latents fire",
    }
    parts += [f"![{says[name]}]({name})" for name in (MEASURED, DENSITY) if name in plots]
    return "\n\n".join(parts)


def _training(entries: Mapping[str, Entry]) -> str:
    """Each set of settings once, with the SAEs it made."""
    made: dict[str, list[str]] = {}
    for path, entry in entries.items():
        if entry.training is not None:
            settings = json.dumps(entry.training, indent=2, ensure_ascii=False)
            made.setdefault(settings.replace("```", "'''").replace("<!--", "<! --"), []).append(
                path
            )
    if not made:
        return "Not recorded."
    parts = []
    for settings, paths in made.items():
        names = ", ".join(f"`{path}`" for path in paths)
        who = "" if len(paths) == len(entries) else f"{names}:\n\n"
        parts.append(f"{who}```json\n{settings}\n```")
    return "\n\n".join(parts)


def _joined(old: Any, new: list[str]) -> list[str]:
    """A YAML value that may be one string or several, and more."""
    before = [old] if isinstance(old, str) else list(old or [])
    return list(dict.fromkeys([*before, *new]))


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _plain(text: str) -> str:
    """As it is: no markup, no table column."""
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
