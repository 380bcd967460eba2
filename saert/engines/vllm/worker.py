"""What runs in vLLM's workers: `Worker` for every engine, `Extension` for eager ones with a worker
class of their own.

An engine that compiles must find the SAEs when it loads its model: `Worker` reads them from
`additional_config["saert"]`, `{"saes": [[hookpoint or null, source], …], "slots": 16}`. An eager
engine may attach and detach at any time, by `collective_rpc("saert_attach", …)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform

from saert.engines.directive import Attached
from saert.engines.vllm.operator import NAME, make_opaque
from saert.engines.vllm.plugin import SLOTS, check_registered, named
from saert.engines.vllm.station import Station
from saert.engines.vllm.support import (
    Unsupported,
    check_config,
    check_version,
    compiles,
    settings_of,
)
from saert.hub.load import load

if TYPE_CHECKING:
    Base = Any
else:
    check_version(vllm.__version__)  # others may have these elsewhere
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base


class Extension:
    """Methods for `collective_rpc`. They answer with JSON, errors too: a worker that raises may
    take its engine with it."""

    def saert_attach(self, saes: list[tuple[str | None, str]], tag: str = "") -> str:
        """Attach sources at hookpoints (null: the SAE's own): all of them or none."""
        return answer(lambda: _attach(self, saes, tag, late=True))

    def saert_detach(self, names: list[str]) -> str:
        """Take SAEs off again, by hookpoint; [] means all."""
        return answer(lambda: _detach(self, names))

    def saert_codes(self, keys: list[str]) -> dict[str, dict[str, bytes]]:
        """The codes of requests that are over, by key and hookpoint; they are kept no longer."""
        station: Station | None = getattr(self, "_saert_station", None)
        store = None if station is None else station.store
        return {} if store is None else {key: store.take(key) for key in keys}


class Worker(Base, Extension):  # type: ignore[misc]
    """The platform's worker, with the SAEs of `additional_config["saert"]` on its model."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model, then attach before anything is compiled."""
        check_version(vllm.__version__)
        check_config(self.vllm_config)
        if not settings_of(self.vllm_config).get("engine"):
            check_registered()
        loaded = super().load_model(*args, **kwargs)
        saes = settings_of(self.vllm_config).get("saes", [])
        attached = _attach(self, saes, "", late=False)
        if compiles(self.vllm_config):
            _compile_around(self.vllm_config, attached)
        return loaded


def answer(do: Callable[[], Any]) -> str:
    """JSON: {"result": …}, or {"error": …, "kind": …} of an error that a caller can mend."""
    try:
        return json.dumps({"result": do()})
    except (ValueError, TypeError, OSError, Unsupported) as error:
        return json.dumps({"error": str(error), "kind": type(error).__name__})


def _station(worker: Any) -> Station:
    found: Station | None = getattr(worker, "_saert_station", None)
    if found is not None:
        return found
    config = worker.vllm_config
    check_version(vllm.__version__)
    check_config(config)
    station = Station(
        worker.model_runner,
        shards=config.parallel_config.tensor_parallel_size,
        rows=config.scheduler_config.max_num_seqs,
        slots=int(settings_of(config).get("slots", SLOTS)),
        keeps=worker.rank == 0,
    )
    worker._saert_station = station
    return station


def _attach(
    worker: Any, saes: list[tuple[str | None, str]], tag: str, *, late: bool
) -> dict[str, dict[str, Any]]:
    station = _station(worker)
    if late and not tag:  # not from `Engine`
        check_registered()
    if late and compiles(worker.vllm_config):
        raise Unsupported(
            "this engine has compiled its model, which would run past hooks that come later: give "
            "the SAEs when it starts (Engine.start(model, saes)), or start it with "
            "enforce_eager=True"
        )
    attached: dict[str, dict[str, Any]] = {}
    try:
        for hookpoint, source in saes:
            sae = load(source, device=worker.model_runner.device)
            name = str(named(hookpoint, sae.hookpoint, source))
            tap = station.attach(name, sae)
            attached[name] = vars(Attached(source, sae.num_latents, station.slots, tag))
            if not late and compiles(worker.vllm_config):
                make_opaque(tap)
        if late and attached:
            worker.execute_dummy_batch()  # a width that does not fit shows here, not in a request
    except BaseException:
        for name in attached:
            station.detach(name)
        raise
    return attached


def _detach(worker: Any, names: list[str]) -> list[str]:
    station = _station(worker)
    if compiles(worker.vllm_config):
        raise Unsupported("this engine has compiled its model, SAEs and all; they cannot go")
    gone = names or list(station.taps)
    for name in gone:
        station.detach(name)
    return gone


def _compile_around(config: Any, attached: dict[str, dict[str, Any]]) -> None:
    """Keep the operator between the pieces that CUDA graphs capture, and say in the key of the
    compile cache what was traced."""
    compilation = config.compilation_config
    settings_of(config)["placed"] = sorted(attached)
    operators = compilation.splitting_ops
    if not operators:
        if compilation.cudagraph_mode.has_full_cudagraphs():
            raise Unsupported(
                "the engine captures whole passes in CUDA graphs, which no request's edits can "
                "enter: start with compilation_config={'cudagraph_mode': 'PIECEWISE'}"
            )
        return
    if NAME not in operators:
        operators.append(NAME)
    if compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = type(compilation.cudagraph_mode).PIECEWISE
