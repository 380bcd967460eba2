"""One text while a model writes it, token by token, as `generate` would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saert.measure.steering.setup import Sampling

CACHE = "past_key_values"
CACHES = (CACHE, "cache_params")  # and that of Mamba
MASK = "attention_mask"


def check_writer(model: Any) -> None:
    """Raise TypeError, NotImplementedError for a model that does not continue a text."""
    name = type(model).__name__
    if not hasattr(model, "generate"):
        raise TypeError(f"found {name}, expected a language model that can generate")
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} has an encoder; only decoders continue a text")


class Stream:
    """A text, the model that reads it, and how its next token is drawn.

    `generate` itself prepares everything (its processors and stopping criteria from the model's
    generation_config, its cache), and hands it over through its public `custom_generate` instead
    of drawing; what it does in a loop is `read`, `draw` and `write` here. The draws come from a
    generator of our own, which on the same device gives what the global one gives after
    `torch.manual_seed`, whoever else draws.

    Attributes:
        ids: int64 [1, T], the text so far.
        ended: whether the model ended it, or it is as long as was asked for.
    """

    def __init__(self, model: Any, ids: Tensor, sampling: Sampling) -> None:
        self._model = model
        self._generator = torch.Generator(ids.device).manual_seed(sampling.seed)
        self.ids, self.ended = ids, False
        self._unread = ids
        config = model.generation_config
        stop = config.eos_token_id
        pad = config.pad_token_id
        if pad is None:  # a batch of one never needs it, but is warned
            pad = 0 if stop is None else stop[0] if isinstance(stop, list) else stop
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=pad,
            max_length=None,  # the model's own would make transformers warn each time
            custom_generate=self._take_over,
            **sampling.options(),
        )

    def _take_over(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **passed: Any,
    ) -> Tensor:
        self._process, self._stop = logits_processor, stopping_criteria
        self._samples = bool(generation_config.do_sample)
        self._cache = {name: passed[name] for name in CACHES if passed.get(name) is not None}
        self._passed = {name: passed[name] for name in (MASK, "logits_to_keep") if name in passed}
        if CACHE not in self._cache:  # Mamba's steps take no mask
            self._passed.pop(MASK, None)
        return input_ids

    @torch.no_grad()
    def read(self) -> Tensor:
        """Logits of the next token, float32 [1, vocabulary], as the model gives them."""
        out = self._model(input_ids=self._unread, use_cache=True, **self._cache, **self._passed)
        caches = {name: getattr(out, name, None) for name in CACHES}
        self._cache = {name: cache for name, cache in caches.items() if cache is not None}
        if not self._cache:
            raise NotImplementedError(
                f"{type(self._model).__name__} keeps no cache, and so cannot write token by token"
            )
        logits: Tensor = out.logits[:, -1].to(self.ids.device, torch.float32, copy=True)
        if logits.isnan().any():
            raise ValueError("the model's logits are NaN; edits of a smaller amount may help")
        return logits

    @torch.no_grad()
    def draw(self, logits: Tensor) -> int:
        """The next token, of the logits as the sampling changes them."""
        scores = self._process(self.ids, logits.clone())
        if not self._samples:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def write(self, token: int) -> None:
        """Append a token, drawn here or elsewhere."""
        self._unread = self.ids.new_tensor([[token]])
        self.ids = torch.cat([self.ids, self._unread], 1)
        if MASK in self._passed:  # without one, transformers warns and looks for padding
            self._passed[MASK] = torch.ones_like(self.ids)
        self.ended = bool(self._stop(self.ids, None).all())
