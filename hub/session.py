"""What a command or an app works on: a model, its tokenizer, and labelled SAEs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saert.edits import Edit
from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.load import load
from saert.hub.sources.address import is_url
from saert.hub.sources.source import is_here
from saert.runtime import Attachment, attach
from saert.sae import SAE

BUNDLED = bundled.NAME


class UserError(Exception):
    """Something that the person who asked can put right: one line, and no traceback."""


@dataclass(frozen=True)
class Loaded:
    """An SAE, the source string it came from, and what is known about its latents."""

    source: str
    sae: SAE
    labels: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.sae.hookpoint)

    def label(self, latent: int) -> str | None:
        """The label of a latent, if somebody gave it one."""
        found = self.labels.get(latent, {}).get("label")
        return None if found is None else str(found)


@dataclass(frozen=True)
class Session:
    """A model with its tokenizer and the SAEs to attach to it."""

    name: str
    model: Any
    tokenizer: Any
    saes: list[Loaded]
    strict: bool = True

    def attach(
        self, edits: Sequence[Edit] = (), *, splice: bool = False, record: bool = True
    ) -> Attachment:
        """All SAEs of the session onto its model."""
        return attach(
            self.model,
            [one.sae for one in self.saes],
            edits,
            splice=splice,
            record="last" if record else False,
            strict=self.strict,
        )

    def encode(self, prompt: str, extra: int = 0) -> Mapping[str, Tensor]:
        """The prompt's tokens, batch of one. `extra` tokens must still fit the model after it."""
        encoded = self.tokenizer(prompt, return_tensors="pt")
        inputs = {
            name: encoded[name].to(self.model.device)
            for name in ("input_ids", "attention_mask")
            if name in encoded
        }
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise UserError("the prompt has no tokens; write at least one word")
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length + extra > limit:
            asked = f" and {extra} more were asked for" if extra else ""
            raise UserError(f"the prompt has {length} tokens{asked}; {self.name} holds {limit}")
        return inputs

    def text(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself, as the model's vocabulary has it."""
        return [str(self.tokenizer.decode([i])) for i in ids]


def open_session(
    model: str | None,
    sources: Sequence[str],
    *,
    hookpoint: str | None = None,
    device: str = "auto",
    strict: bool = True,
    load: Callable[[str, str], tuple[Any, Any]] | None = None,
) -> Session:
    """The model and SAEs that `--model` and `--sae` name; the bundled ones by default.

    `load(name, device)` makes the model and tokenizer, in place of `load_model`.
    """
    ours = model in (None, BUNDLED)
    if ours and not sources:
        sources = [BUNDLED]
    if not sources:
        raise UserError(f"--model {model}: which SAE? Add --sae REPO_OR_FOLDER[:PATH]")
    saes = [load_sae(source) for source in sources]
    if hookpoint is not None:
        if len(saes) > 1:
            raise UserError(f"--hookpoint is for a single SAE, found {len(saes)}")
        saes[0].sae.hookpoint = Hookpoint.parse(hookpoint)
    nameless = [one.source for one in saes if one.sae.hookpoint is None]
    if nameless:
        raise UserError(f"{nameless[0]} does not say where it reads; add --hookpoint resid_post.6")
    name = model or _model_of(saes)
    found, tokenizer = (load or load_model)(name, device)
    return Session(name, found, tokenizer, saes, strict)


def load_model(name: str, device: str = "auto", *, blocks: int | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer: bundled, a local folder, or a Hub id.

    `blocks`: only its first so many, under the configuration of all of them.
    """
    place = _device(device, small=name == BUNDLED)
    model: Any
    if name == BUNDLED:
        model, tokenizer = bundled.model(), bundled.tokenizer()
        return model.to(place), tokenizer
    _check_local(name, "--model")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _named(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        if blocks is None:
            model = AutoModelForCausalLM.from_pretrained(name)
        else:
            config = AutoConfig.from_pretrained(name)
            text = config.get_text_config()
            all_of_them, text.num_hidden_layers = text.num_hidden_layers, blocks
            model = AutoModelForCausalLM.from_pretrained(name, config=config)
            model.config.get_text_config().num_hidden_layers = all_of_them
    return model.eval().to(place), tokenizer


def load_sae(source: str) -> Loaded:
    """An SAE by source string: `bundled:PATH`, or whatever `load` takes."""
    repo, _, path = source.partition(":")
    if repo == BUNDLED:
        path = path or bundled.DEMO.hookpoint
        sae = load(BUNDLED, path)
        return Loaded(f"{BUNDLED}:{path}", sae, bundled.labels(path))
    if not (is_here(source) or is_url(source)):
        _check_local(repo, "--sae")
    known = _labels_beside(source)
    with _named(source):
        sae = load(source)  # it knows short names, addresses and REPO:PATH
    return Loaded(source, sae, known)


def canonical(source: str) -> str:
    """One spelling for each SAE, as far as that is known without looking anywhere."""
    source = source.strip()
    head, _, inner = source.partition(":")
    if head == BUNDLED:
        return f"{BUNDLED}:{inner or bundled.DEMO.hookpoint}"
    if not is_url(source) and head.startswith((".", "/", "~")):
        return os.path.abspath(os.path.expanduser(head)) + (f":{inner}" if inner else "")
    return source


def _labels_beside(source: str) -> dict[int, Mapping[str, Any]]:
    """What `labels.json` in the folder of a local SAE says of its latents."""
    if is_url(source) or not is_here(source):
        return {}
    whole, (head, _, inner) = Path(source).expanduser(), source.partition(":")
    folder = whole if whole.exists() else Path(head).expanduser() / inner
    labels = folder / "labels.json"
    known = json.loads(labels.read_text("utf-8")) if labels.is_file() else {}
    return {int(key): entry for key, entry in known.items()}


def _model_of(saes: Sequence[Loaded]) -> str:
    if all(one.source.startswith(BUNDLED) for one in saes):
        return BUNDLED
    names = {str(name) for one in saes if (name := one.sae.metadata.get("base_model"))}
    if len(names) == 1:
        return names.pop()
    what = f"the SAEs name several ({', '.join(sorted(names))})" if names else "the SAE names none"
    raise UserError(f"which model? {what}; add --model REPO_OR_FOLDER")


@contextmanager
def _named(source: str) -> Iterator[None]:
    """A broken file or connection is the source's: libraries raise their own classes without it."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "safetensors"):
            raise UserError(f"{source}: {error} ({type(error).__name__})") from error
        raise


def _device(name: str, small: bool) -> torch.device:
    """`auto` is the GPU if there is one, but the CPU for a model that a GPU would slow down."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected cpu, cuda, cuda:1, mps or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: found {torch.cuda.device_count()} CUDA devices here")
    return device


def _check_local(name: str, option: str) -> None:
    """A path that does not exist should not be looked for on the Hub."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    path = Path(name)
    if not looks_local or path.exists():
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{option} {name}: no such file or folder{_nearest(path.name, siblings)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, 3, 0.4)
    return f"; nearest: {', '.join(close)}" if close else ""
