"""What vLLM runs in each of its processes (entry point `vllm.general_plugins`).

It makes sure of what a user cannot be left to remember: the model runner is the one we know, a
request with edits never shares a prefix cache with others, and no request of an engine with SAEs
draws what transformers would not (`suppress_tokens`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

from saert.engines.directive import KEY, Attached, Directive
from saert.engines.vllm.support import (
    RUNNER,
    Unsupported,
    check_config,
    check_version,
    check_worker,
    ours,
    settings_of,
)
from saert.hookpoint import Hookpoint

SLOTS = 16  # edits of one SAE that a request may have, unless the settings say another number


def register() -> None:
    """Prefer model runner V1, and let every request pass `suppress` and `admit`. Again: nothing.

    vLLM runs this for engines without SAEs too, so a version that we do not know is left as it is;
    our workers refuse to start with it.
    """
    import vllm

    try:
        check_version(vllm.__version__)
    except Unsupported:
        return
    os.environ.setdefault(RUNNER, "0")
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, "_saert"):
        return

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        suppress(self.vllm_config, self.generation_config_fields, request.sampling_params)
        admit(self.vllm_config, request)
        return request

    process_inputs._saert = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def check_registered() -> None:
    """Raise Unsupported in a process that vLLM did not run the plugin in.

    Processes share an environment, so then the front end lacks it too, and nothing would check or
    salt its requests.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    if not hasattr(InputProcessor.process_inputs, "_saert"):
        raise Unsupported(
            "vLLM did not load saert's plugin, without which a prefix cache would mix edited and "
            "unedited requests: install saert with pip in this environment, and name saert in "
            "VLLM_PLUGINS if that is set; or use saert.engines.vllm.Engine"
        )


def suppress(config: Any, generation: Mapping[str, Any], params: Any) -> None:
    """Never draw what the model's generation_config.json says never to draw: `suppress_tokens`,
    which `generate` of transformers heeds and vLLM does not know.

    A bias that the request itself has for such a token stands. As with the rest of that file,
    `generation_config="vllm"` ignores it and `override_generation_config` comes first.

    Args:
        generation: what the file says.
        params: SamplingParams, of which `logit_bias` is replaced; None (pooling): nothing happens.
    """
    if params is None or not ours(config):
        return
    model = config.model_config
    fields = {} if model.generation_config == "vllm" else generation
    never = {**fields, **model.override_generation_config}.get("suppress_tokens") or ()
    size = model.get_vocab_size()
    barred = {token: -math.inf for token in never if 0 <= token < size}
    if barred:
        params.logit_bias = barred | (params.logit_bias or {})


def admit(config: Any, request: Any) -> None:
    """Check what a request asks of saert, before any worker sees it; salt its prefix cache.

    Raises:
        ValueError, TypeError: it asks for what there is not; vLLM refuses this request alone.
        Unsupported: the engine could not do it.
    """
    params = request.sampling_params
    if params is None:
        return  # pooling
    args = params.extra_args or {}
    extra = config.additional_config
    default = (extra.get(KEY) or {}).get("default") if isinstance(extra, dict) else None
    if args.get(KEY) is None and not default:
        return  # nobody's business
    own = Directive() if args.get(KEY) is None else Directive.parse(args[KEY])
    directive = own.after(Directive.parse(default or {}))
    if directive.empty:
        return
    import vllm

    check_version(vllm.__version__)
    check_worker(config)
    check_config(config)
    if request.resumable:
        raise ValueError(f"{KEY}: a streamed prompt has no end that edits could be told by")
    catalogue = catalogue_of(settings_of(config))
    directive = directive.resolved(catalogue)
    if directive.codes:
        if not directive.key or (params.n or 1) > 1:
            raise ValueError(
                f"{KEY}: codes are kept under a key, for a request with n=1: use "
                "saert.engines.vllm.Engine, or give each request a key of its own"
            )
        params.skip_reading_prefix_cache = True  # cached tokens do not run, and leave no codes
    params.extra_args = {**args, KEY: directive.to_data()}
    request.cache_salt = directive.salt(request.cache_salt, _prompt_length(request), catalogue)


def catalogue_of(settings: dict[str, Any]) -> dict[str, Attached]:
    """What is attached, as the front end knows it: what it was told, or what the settings load."""
    if "catalogue" not in settings:
        found = {}
        for hookpoint, source in settings.get("saes", ()):
            from saert.hub.load import load

            sae = load(source)  # for its name and size: the workers have it
            at = str(named(hookpoint, sae.hookpoint, source))
            slots = int(settings.get("slots", SLOTS))
            found[at] = vars(Attached(source, sae.num_latents, slots))
        settings["catalogue"] = found
    return {name: Attached(**facts) for name, facts in settings["catalogue"].items()}


def named(given: str | None, own: Hookpoint | None, source: str) -> Hookpoint:
    """The hookpoint of an SAE: the one that was asked for, else its own."""
    if given is not None:
        return Hookpoint.parse(given)
    if own is None:
        raise ValueError(f"{source}: the SAE does not say where it belongs; name a hookpoint")
    return own


def _prompt_length(request: Any) -> int:
    prompt = request.prompt_token_ids
    return len(request.prompt_embeds if prompt is None else prompt)
