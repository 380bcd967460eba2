"""`Engine`: an `LLM` whose prompts take edits of their own and give their codes back."""

from __future__ import annotations

import builtins
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from saert.engines.codes import unpack
from saert.engines.directive import KEY, Attached, Directive, GivenEdit, specs
from saert.engines.vllm.plugin import catalogue_of, register
from saert.engines.vllm.support import (
    WORKER,
    Unsupported,
    check_config,
    check_version,
    check_worker,
    prefer_v1,
    settings_of,
)
from saert.sparse import SparseCode

Sources = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
Edits = GivenEdit | Sequence[GivenEdit] | Sequence[Sequence[GivenEdit]]


@dataclass(frozen=True, eq=False)
class Result:
    """One prompt's continuation.

    Attributes:
        output: vLLM's own RequestOutput.
        codes: by hookpoint, SparseCode [tokens, k] of every token that the model read: the prompt,
            and all that it generated but the last.
    """

    output: Any
    codes: dict[str, SparseCode] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What was generated."""
        return str(self.output.outputs[0].text)

    @property
    def token_ids(self) -> list[int]:
        """Its tokens."""
        return list(self.output.outputs[0].token_ids)


class Engine:
    """A vLLM `LLM` with SAEs on its model.

    Args:
        llm: an `LLM` that was started with saert's worker class or extension; `Engine.start` is
            the shorter way.

    Raises Unsupported: its workers, its settings or its version are not ones saert works with.
    """

    def __init__(self, llm: Any) -> None:
        import vllm

        check_version(vllm.__version__)
        register()
        self.llm = llm
        self._config = llm.llm_engine.vllm_config
        check_worker(self._config)
        check_config(self._config)

    @classmethod
    def start(
        cls, model: str | Path, saes: Sources = (), *, slots: int = 16, **options: Any
    ) -> Engine:
        """Start vLLM with SAEs on the model from the beginning, as compiled engines need.

        Args:
            saes: sources as for `saert.load`, or {hookpoint: source}.
            slots: how many edits of one SAE a request may have.
            options: for `vllm.LLM`: `enforce_eager=True` (attach and detach at any time; slower),
                `tensor_parallel_size`, `model_impl="transformers"`, `dtype`, …

        Raises what `saert.load` raises, and Unsupported, before anything is started.
        """
        prefer_v1()  # before vLLM decides on a model runner
        import vllm

        check_version(vllm.__version__)
        from vllm import LLM

        extra = dict(options.pop("additional_config", {}))
        extra[KEY] = {**extra.get(KEY, {}), "saes": _pairs(saes), "slots": slots, "engine": True}
        catalogue_of(extra[KEY])  # an SAE that cannot be loaded fails here, not in a worker
        return cls(LLM(str(model), worker_cls=WORKER, additional_config=extra, **options))

    @property
    def attached(self) -> dict[str, Attached]:
        """The SAEs by hookpoint."""
        return catalogue_of(settings_of(self._config))

    def attach(self, saes: Sources) -> None:
        """Attach to an eager engine. ValueError and others as `saert.attach` raises them."""
        new = self._call("saert_attach", _pairs(saes), uuid.uuid4().hex)
        known = {name: vars(sae) for name, sae in self.attached.items()}
        settings_of(self._config)["catalogue"] = known | new

    def detach(self, *names: str) -> None:
        """Take SAEs off an eager engine; without names all of them."""
        gone = self._call("saert_detach", list(names))
        left = {name: vars(sae) for name, sae in self.attached.items() if name not in gone}
        settings_of(self._config)["catalogue"] = left

    def for_all(self, edits: Iterable[GivenEdit] = (), *, splice: Sequence[str] = ()) -> None:
        """Edits and splices of every request from now on, ahead of its own; () for none again."""
        directive = Directive(edits=specs(edits), splice=tuple(splice)).resolved(self.attached)
        settings_of(self._config)["default"] = directive.to_data()

    def generate(
        self,
        prompts: Any,
        params: Any = None,
        *,
        edits: Edits = (),
        splice: Sequence[str] = (),
        codes: Sequence[str] = (),
        use_tqdm: bool = False,
    ) -> list[Result]:
        """Continue prompts, each under edits of its own.

        Args:
            prompts, params, use_tqdm: as for `LLM.generate`; without params the model's own
                defaults. Tokens in `suppress_tokens` of its generation_config.json are never drawn
                (`saert.engines.vllm.plugin.suppress`).
            edits: one list for all prompts, or a list of lists, one for each.
            splice, codes: hookpoints where the SAE's reconstruction replaces the hidden state, and
                whose codes come back.

        Raises ValueError, TypeError: edits that cannot be meant; nothing was generated.
        """
        many = prompts if isinstance(prompts, list) and not _ids(prompts) else [prompts]
        params = self.llm.get_default_sampling_params() if params is None else params
        given = params if isinstance(params, list) else [params] * len(many)
        own = _per_prompt(edits, len(many))
        if len(given) != len(many):
            raise ValueError(f"generate: {len(given)} params for {len(many)} prompts")
        directives = [
            Directive(specs(e), tuple(splice), tuple(codes), uuid.uuid4().hex if codes else "")
            for e in own
        ]
        directives = [d.resolved(self.attached) for d in directives]  # before any of them runs
        directed = [with_directive(p, d) for p, d in zip(given, directives, strict=True)]
        outputs = self.llm.generate(many, directed, use_tqdm=use_tqdm)
        found = self._codes([d.key for d in directives]) if codes else {}
        return [
            Result(output, {n: _trimmed(n, found.get(d.key, {}), output) for n in d.codes})
            for output, d in zip(outputs, directives, strict=True)
        ]

    def _codes(self, keys: list[str]) -> dict[str, dict[str, bytes]]:
        replies = self.llm.collective_rpc("saert_codes", args=(keys,))
        return {key: packed for reply in replies for key, packed in reply.items()}

    def _call(self, method: str, *args: Any) -> Any:
        return result_of(self.llm.collective_rpc(method, args=args))


def with_directive(params: Any, directive: Directive) -> Any:
    """A copy of SamplingParams that carries a directive, for engines of any kind."""
    copy = params.clone()
    if not directive.empty:
        copy.extra_args = {**(params.extra_args or {}), KEY: directive.to_data()}
    return copy


def result_of(replies: Sequence[str]) -> Any:
    """What all workers answered; the first error of any is raised here."""
    answers = [json.loads(reply) for reply in replies]
    for one in answers:
        if "error" in one:
            kind = Unsupported if one["kind"] == "Unsupported" else _builtin(one["kind"])
            raise kind(one["error"])
    return answers[0]["result"]


def _builtin(name: str) -> type[Exception]:
    kind = getattr(builtins, name, ValueError)  # HookpointError and FormatError are ValueErrors
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else ValueError


def _trimmed(name: str, packed: Mapping[str, bytes], output: Any) -> SparseCode:
    """The codes of the tokens that were read: not of drafts that came to nothing."""
    read = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
    if name not in packed:
        raise RuntimeError(
            f"{name}: the worker kept no codes of {read} tokens; it keeps a limited number, so ask "
            "for fewer requests at a time"
        )
    chunk = unpack(packed[name])
    if not torch.equal(chunk.positions[:read], torch.arange(read)):
        raise RuntimeError(f"{name}: codes of {len(chunk.positions)} tokens, expected {read}")
    code = chunk.code[:read]
    return SparseCode(code.indices, code.values.nan_to_num(0.0), code.num_latents)


def _pairs(saes: Sources) -> list[list[str | None]]:
    if isinstance(saes, Mapping):
        return [[str(at), str(source)] for at, source in saes.items()]
    each = [saes] if isinstance(saes, str | Path) else saes
    return [[None, str(source)] for source in each]


def _per_prompt(edits: Any, prompts: int) -> list[Any]:
    nested = isinstance(edits, list | tuple) and any(
        isinstance(one, list | tuple) or one is None for one in edits
    )
    if not nested:
        return [edits] * prompts
    if len(edits) != prompts:
        raise ValueError(f"edits: found {len(edits)} lists, expected one for each of {prompts}")
    return [one or () for one in edits]


def _ids(prompts: list[Any]) -> bool:
    return all(isinstance(token, int) for token in prompts)
