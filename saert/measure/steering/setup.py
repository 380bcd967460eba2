"""Everything that determines a pair of texts, as plain data: to share, to store, to run again."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from saert.measure.steering.snippet import snippet
from saert.measure.steering.spec import (
    EditSpec,
    checked_name,
    checked_text,
    known_fields,
    number,
    short,
    source_of,
    whole,
)

MAX_NEW_TOKENS = 8192
MAX_EDITS = 64
MAX_PROMPT = 32 * 1024  # characters
MAX_JSON = 8 * MAX_PROMPT  # JSON may take six for one
COOLEST, HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: as `generate` draws them after `torch.manual_seed(seed)`.

    Attributes:
        max_new_tokens: at most so many, 1 to 8192.
        temperature: 0 takes the likeliest token; else 0.01 to 100.
        top_p: draw from the likeliest tokens that together hold this probability; 1: from all.
        seed: of both texts.

    Raises ValueError, TypeError: a value outside of that.
    """

    max_new_tokens: int = 60
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value, and make whole numbers int and others float."""
        tokens = whole("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        temperature = number("temperature", self.temperature)
        if temperature != 0 and not COOLEST <= temperature <= HOTTEST:
            raise ValueError(
                f"temperature: found {temperature:g}, expected 0 (always the likeliest token) or "
                f"{COOLEST:g} to {HOTTEST:g}"
            )
        top_p = number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: found {top_p:g}, expected more than 0 and at most 1")
        seed = whole("seed", self.seed)
        for name, value in (
            ("max_new_tokens", tokens), ("temperature", temperature), ("top_p", top_p),
            ("seed", seed),
        ):  # fmt: skip
            object.__setattr__(self, name, value)  # frozen for everyone else

    def options(self) -> dict[str, Any]:
        """What `model.generate` takes for this; the seed is `torch.manual_seed`'s.

        The rest of the model's generation_config stays in force (suppressed tokens, a repetition
        penalty), but neither beams nor its own temperature, top-k and top-p.
        """
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        if self.temperature == 0:
            return options | {"do_sample": False}
        drawn = {"temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
        return options | {"do_sample": True} | drawn


@dataclass(frozen=True)
class Setup:
    """A model, a prompt, edits and a way to draw tokens.

    Attributes:
        model: "bundled", a folder or a Hub id.
        prompt: what to continue, or with `chat` what a user says, in the model's chat template;
            at most 32768 characters (`side_by_side` takes longer ones as ids).
        edits: in the order they apply.
        splice: replace the hidden state by the SAEs' reconstruction, so that what they cannot
            explain is lost too.
        sampling: how tokens are drawn.
        saes: SAEs to attach beside those that edits name: for their figures (`Step.live`), or to
            splice in without an edit.

    Raises ValueError, TypeError: a value that cannot be meant.

    >>> setup = Setup("bundled", "Once upon", edits=(EditSpec("bundled:resid_post.2", 71),))
    >>> Setup.from_link(setup.to_link()) == setup
    True
    """

    model: str
    prompt: str
    chat: bool = False
    edits: tuple[EditSpec, ...] = ()
    splice: bool = False
    sampling: Sampling = Sampling()
    saes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every value, and make the sequences tuples."""
        model = checked_name("model", self.model, "bundled, a folder or a Hub id")
        object.__setattr__(self, "model", model)  # frozen for everyone else
        if len(checked_text("prompt", self.prompt)) > MAX_PROMPT:
            raise ValueError(
                f"prompt: found {len(self.prompt):,} characters, expected at most {MAX_PROMPT:,}"
            )
        for name in ("chat", "splice"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: found {short(value)}, expected true or false")
        for name, kind in (("edits", EditSpec), ("saes", str)):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(v, kind) for v in value):
                raise TypeError(f"{name}: found {short(value)}, expected a list of {kind.__name__}")
            if len(value) > MAX_EDITS:
                raise ValueError(f"{name}: found {len(value)}, expected at most {MAX_EDITS}")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "saes", tuple(source_of("saes", one) for one in self.saes))
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling: found {type(self.sampling).__name__}, expected Sampling")

    @property
    def sources(self) -> tuple[str, ...]:
        """The SAEs it needs, in the order they are attached: those of edits, then `saes`."""
        return tuple(dict.fromkeys([*(edit.sae for edit in self.edits), *self.saes]))

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """From `to_json`, or from anyone. ValueError, TypeError: what is wrong with it."""
        if len(text) > MAX_JSON:
            raise ValueError(f"a setup of {len(text)} characters; at most {MAX_JSON} are read")
        try:
            given = json.loads(text, parse_constant=_no_constant)
        except RecursionError:
            raise ValueError("a setup nested too deep to be one") from None
        found = known_fields(cls, given, "a setup")
        if "sampling" in found:
            drawn = known_fields(Sampling, found["sampling"], "sampling")
            found["sampling"] = Sampling(**drawn)
        if isinstance(edits := found.get("edits"), list) and len(edits) <= MAX_EDITS:
            found["edits"] = tuple(
                EditSpec.from_dict(one) if isinstance(one, Mapping) else one for one in edits
            )
        return cls(**found)

    def to_link(self) -> str:
        """All of it in letters, digits, - and _, for the address of a page."""
        packed = zlib.compress(self.to_json().encode(), 9)
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def from_link(cls, link: str) -> Setup:
        """From `to_link`; nothing large is unpacked. ValueError, TypeError: what is wrong."""
        if len(link) > MAX_JSON:
            raise ValueError(f"a link of {len(link)} characters; at most {MAX_JSON} are read")
        unpacker = zlib.decompressobj()
        try:
            packed = base64.b64decode(link + "=" * (-len(link) % 4), altchars=b"-_", validate=True)
            text = unpacker.decompress(packed, MAX_JSON + 1)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"not a link that saert made ({error})") from None
        if len(text) > MAX_JSON:
            raise ValueError(f"a link that unpacks to more than {MAX_JSON} characters")
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("not a whole link: some of it is missing, or something follows it")
        return cls.from_json(text.decode())

    def snippet(self, *, strict: bool = True) -> str:
        """A whole Python script that prints the same two texts; `strict` as for `attach`."""
        return snippet(self, strict)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"a setup holds {name}, which is no number to steer with")
