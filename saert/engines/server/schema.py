"""What clients may ask: OpenAI's bodies, and the `saert` field.

A field that would change the answer and is not supported is refused unless it asks for nothing;
one that says something about the client only is taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saert.edits import Phase
from saert.engines.server.monitors import Action

EDITS, MONITORS, CODES, TOP, STOPS = 64, 16, 8, 64, 4  # at most
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Latent = Annotated[int, Field(ge=0, strict=True)] | Name


class Strict(BaseModel):
    """No unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class CodesOf(Strict):
    """Which codes to return: the `top` strongest latents of an SAE at each token read."""

    sae: Name | None = None
    top: int = Field(8, ge=1, le=TOP)
    phase: Phase = "all"


class MonitorOf(Strict):
    """A latent to watch; see `saert.engines.server.monitors`."""

    sae: Name | None = None
    latent: Latent
    threshold: float = 0.0
    action: Action = "flag"
    value: float = 0.0
    phase: Phase = "all"


class Saert(Strict):
    """What a request asks of the attached SAEs.

    Attributes:
        edits: `EditSpec` as plain data; `latent` and `when` may be labels, and `sae` may be left
            out where only one is attached.
        splice: reconstructions replace hidden states, of all SAEs or of those named.
    """

    edits: list[dict[str, Any]] = Field(default_factory=list, max_length=EDITS)
    splice: bool | list[Name] = False
    return_codes: CodesOf | Annotated[list[CodesOf], Field(max_length=CODES)] | None = None
    monitors: list[MonitorOf] = Field(default_factory=list, max_length=MONITORS)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # only its default


class Common(Strict):
    """The fields of both kinds of request."""

    model: Name
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Name | Annotated[list[Name], Field(max_length=STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    saert: Saert | None = None

    # taken and ignored
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # taken if they ask for nothing
    n: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
    }

    @model_validator(mode="after")
    def _refuse(self) -> Common:
        for name, allowed in self.neutral.items():
            found = getattr(self, name)
            odd = isinstance(found, bool) != isinstance(allowed[0], bool)  # True == 1
            if found is not None and (odd or found not in allowed):
                wanted = " or ".join(repr(one) for one in allowed)
                raise ValueError(f"{name}: this server supports {wanted} only")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only for stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Completion(Common):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[Any], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = Common.neutral | {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    @property
    def alternatives(self) -> int | None:
        """How many to tell with each token; None: no log-probabilities at all."""
        return self.logprobs


class Part(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its parts, joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(Common):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    store: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    response_format: Any = None
    modalities: Any = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = Common.neutral | {
        "store": (False,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }

    @model_validator(mode="after")
    def _logprobs(self) -> Chat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many to tell with each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
