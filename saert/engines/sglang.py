"""A forward-hook factory for SGLang: one SAE on one module, with the edits of its configuration.

    sglang serve … --disable-cuda-graph --forward-hooks '[{
        "name": "saert", "target_modules": ["model.layers.5"],
        "hook_factory": "saert.engines.sglang:make",
        "config": {"sae": "bundled:resid_post.2", "edits": [{"latent": 71, "amount": 9}]}}]'

SGLang registers hooks after it captures CUDA graphs, which run past them: they must be off. A hook
is not told which request a token belongs to, so the edits are everyone's, at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saert.engines.directive import specs
from saert.engines.rows import Batch
from saert.engines.taps import StreamHook, Tap
from saert.hub.load import load
from saert.measure.steering.spec import EditSpec
from saert.sae import SAE

Hook = Callable[[nn.Module, Any, Any], Any]
SETTINGS = ("sae", "edits", "splice")


def make(config: Mapping[str, Any] | None) -> Hook:
    """The hook that SGLang registers on the output of each target module.

    Args:
        config: {"sae": a source as for `saert.load`, "edits": [EditSpec as plain data, without
            "sae" or with the same], "splice": false}.

    The module may return hidden [T, d], (hidden, residual), whose sum is the stream, or a tuple
    that begins with hidden.

    Raises ValueError, TypeError: a setting that cannot be meant; a transcoder, which reads one
    module and writes another; an edit that selects a phase.
    """
    config = {} if config is None else config
    if unknown := [key for key in config if key not in SETTINGS]:
        raise ValueError(f"saert: unknown setting {unknown[0]!r}; expected {', '.join(SETTINGS)}")
    source = config.get("sae")
    if not isinstance(source, str) or not source:
        raise ValueError(
            f"saert: sae: found {source!r}, expected a source, as bundled:resid_post.2"
        )
    edits = _edits(source, config.get("edits", ()))
    splice = config.get("splice", False)
    if not isinstance(splice, bool):
        raise TypeError(f"saert: splice: found {splice!r}, expected true or false")
    sae = load(source)
    top = max((max(one.latent, one.when or 0) for one in edits), default=0)
    if top >= sae.num_latents:
        raise ValueError(f"saert: latent {top} does not exist; {source} has {sae.num_latents}")
    if sae.is_transcoder:
        raise ValueError(f"saert: {source} is a transcoder, which one module's hook cannot apply")
    made: dict[torch.device, Tap] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, Tensor) or not (edits or splice) or not hidden.numel():
            return None
        if hidden.device not in made:  # where the model is, is only known now
            made[hidden.device] = _tap(source, sae.to(hidden.device), edits, splice)
        tap = made[hidden.device]
        tokens = torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
        tap.batch = Batch(tokens, torch.ones_like(tokens), tokens, bool(edits), splice)
        return StreamHook(tap.on_hidden)(module, args, output)

    return hook


def _tap(source: str, sae: SAE, edits: tuple[EditSpec, ...], splice: bool) -> Tap:
    tap = Tap(source, sae, rows=2, slots=max(1, len(edits)))
    tap.table.write(1, [one.edit(sae) for one in edits])
    tap.spliced[1] = splice
    return tap


def _edits(source: str, given: Any) -> tuple[EditSpec, ...]:
    if isinstance(given, list | tuple):  # they need not repeat what the configuration says
        given = [{"sae": source} | dict(e) if isinstance(e, Mapping) else e for e in given]
    edits = specs(given)
    for one in edits:
        if one.sae != source:
            raise ValueError(f"saert: an edit of {one.sae}, but this hook has {source}")
        if one.phase != "all":
            raise ValueError(
                f"saert: phase {one.phase!r}: SGLang does not tell a hook where a prompt ends; "
                "expected 'all', or use vLLM"
            )
    return edits
