"""The SAEs in one worker: what is attached, and which request's tokens each of them sees next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saert.engines.codes import CodeStore
from saert.engines.directive import Directive
from saert.engines.places import place
from saert.engines.rows import Rows, batch_of, directive_of
from saert.engines.taps import Tap
from saert.engines.vllm.support import Unsupported
from saert.hookpoint import Hookpoint
from saert.sae import SAE

RUNNER = ("_model_forward", "requests", "input_batch", "query_start_loc")  # what we rely on


class Station:
    """Taps of one model runner, told of every pass before it runs.

    Args:
        runner: vLLM's V1 model runner, its model loaded.
        shards: processes of tensor parallelism.
        rows: requests at a time.
        slots: edits that a request may have at one hookpoint.
        keeps: whether this worker keeps codes (one of those that run in parallel does).

    Raises Unsupported: a runner without the parts that this was written for.
    """

    def __init__(self, runner: Any, *, shards: int, rows: int, slots: int, keeps: bool) -> None:
        if missing := [name for name in RUNNER if not hasattr(runner, name)]:
            raise Unsupported(
                f"the model runner {type(runner).__name__} has no {missing[0]}: it is not the V1 "
                "runner of a vLLM that saert was tested with"
            )
        self.runner, self.shards, self.slots, self.count = runner, shards, slots, rows
        self.store = CodeStore() if keeps else None
        self.taps: dict[str, Tap] = {}
        self._rows = Rows(rows)
        self._asked: dict[str, tuple[Any, Directive | None]] = {}
        self._forward: Callable[..., Any] = runner._model_forward
        runner._model_forward = self._pass

    def attach(self, name: str, sae: SAE) -> Tap:
        """Put an SAE on the model. ValueError if one is there already, or it does not fit."""
        if name in self.taps:
            raise ValueError(f"{name}: an SAE is attached there already; detach it first")
        model: nn.Module = self.runner.get_model()
        read = place(model, Hookpoint.parse(name), shards=self.shards)
        target = sae.target_hookpoint
        write = read if target is None else place(model, target, shards=self.shards)
        tap = Tap(name, sae.eval(), self.count + 1, self.slots, self.store)
        tap.hook(read, write)
        self.taps[name] = tap
        return tap

    def detach(self, name: str) -> None:
        """Take it off. ValueError if it is not there, or a request that runs has edits of it."""
        if name not in self.taps:
            raise ValueError(f"{name}: no SAE is attached there; {', '.join(self.taps) or 'none'}")
        live = (self.runner.requests[r].sampling_params for r in self.runner.requests)
        asked = [directive_of(params.extra_args) for params in live if params is not None]
        if users := sum(name in one.names for one in asked if one is not None):
            raise ValueError(f"{name}: {users} requests that run now use it; wait, or abort them")
        self.taps.pop(name).remove()

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """The model's pass, with every tap told which tokens are whose."""
        try:
            if self.taps:
                self._tell(kwargs["positions"] if "positions" in kwargs else args[1])
            return self._forward(*args, **kwargs)
        finally:
            for tap in self.taps.values():
                tap.batch = None  # other passes are rehearsals

    def _tell(self, positions: Tensor) -> None:
        requests = list(self.runner.input_batch.req_ids)
        self._rows.keep(requests)
        self._asked = {r: self._asked[r] for r in requests if r in self._asked}
        directives = [self._directive(request) for request in requests]
        starts = self.runner.query_start_loc.np[: len(requests) + 1].tolist()
        rows = [self._rows.of(r) for r in requests]
        for name, tap in self.taps.items():
            tap.batch = batch_of(name, directives, rows, starts, positions)

    def _directive(self, request: str) -> Directive | None:
        """What a request asks for, its row written when it is first seen."""
        state = self.runner.requests[request]
        params = state.sampling_params
        if request in self._asked and self._asked[request][0] is params:
            return self._asked[request][1]
        directive = None if params is None else directive_of(params.extra_args)
        self._asked[request] = params, directive
        if directive is not None or self._rows.of(request):
            row = self._rows.lend(request)  # which may hold what another left there
            for tap in self.taps.values():
                tap.write(row, directive, state.num_prompt_tokens)
        return directive
