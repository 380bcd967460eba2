"""Passes of a transformers model whose tokens are many requests': `Passes`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from saert.engines.directive import Attached, Directive
from saert.engines.rows import Batch, batch_of
from saert.engines.server.monitors import PassCodes
from saert.engines.server.padded import Padded, check
from saert.engines.taps import Tap
from saert.hookpoint import Hookpoint
from saert.hooks import device_of
from saert.sae import SAE


class Passes:
    """A causal language model with SAEs hooked to it.

    Args:
        model: this object's own from now on, hooks and all; see `saert.twin`.
        saes: by hookpoint.
        attached: `slots` of its entries size the tables.
        rows: of each table: requests at a time, and 1.

    Attributes:
        codes: of the latest pass, by request and hookpoint.
        context: how many tokens the model holds; vocabulary: how many it knows.
        count: passes so far.

    Raises ValueError: an SAE that does not fit, a hookpoint or a model that cannot be served.
    """

    def __init__(
        self, model: Any, saes: Mapping[str, SAE], attached: Mapping[str, Attached], rows: int
    ) -> None:
        self._model, self.device, self.codes, self.count = model, device_of(model), PassCodes(), 0
        takes = inspect.signature(model.forward).parameters
        self._extras = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._places = "position_ids" in takes
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = int(limit) if limit else 2**31
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        generation = getattr(model, "generation_config", None)
        never = getattr(generation, "suppress_tokens", None) or []
        self._never = torch.tensor(never, dtype=torch.int64, device=self.device)
        self._taps: dict[str, Tap] = {}
        self._told: tuple[list[Directive | None], tuple[list[int], list[int]]] = [], ([], [])
        self._batches: dict[str, Batch | None] = {}
        try:
            for name, sae in saes.items():
                self._taps[name] = self._tap(name, sae, rows, attached[name].slots)
            self._rehearse()
        except BaseException:
            self.close()
            raise

    def _tap(self, name: str, sae: SAE, rows: int, slots: int) -> Tap:
        read = Hookpoint.parse(name).resolve(self._model)
        target = sae.target_hookpoint
        write = read if target is None else target.resolve(self._model)
        if write.carry is not None:
            raise ValueError(
                f"{name}: the block keeps a copy of this stream, which edits of single requests do "
                "not reach; serve an SAE of resid_post, attn_out, mlp_in or mlp_out"
            )
        tap = Tap(name, sae.to(self.device).eval(), rows, slots, self.codes)
        tap.hook(read, write)
        return tap

    def close(self) -> None:
        """Take the hooks off."""
        for tap in self._taps.values():
            tap.remove()

    # -- tables --------------------------------------------------------------------------------

    def write(self, row: int, directive: Directive, prompt_length: int) -> None:
        """Give a row of the tables to a request."""
        for name in directive.names:
            self._taps[name].write(row, directive, prompt_length)

    def clear(self, row: int, directive: Directive) -> None:
        """Take it back."""
        for name in directive.names:
            self._taps[name].write(row, None, 0)

    def clear_all(self) -> None:
        """Nobody has edits; forget, too, that somebody's needed the code."""
        for tap in self._taps.values():
            tap.table.clear_all()

    # -- passes --------------------------------------------------------------------------------

    def prompt(self, ids: Sequence[int], row: int = 0, directive: Directive | None = None) -> Any:
        """Read a prompt: logits [1, vocabulary] of its last token, and the cache."""
        given = torch.tensor([ids], device=self.device)
        positions = torch.arange(len(ids), device=self.device)
        starts, mask = [0, len(ids)], torch.ones_like(given)
        return self._forward([directive], [row], starts, given, positions, mask, DynamicCache())

    def token(
        self,
        ids: Sequence[int],
        padded: Padded,
        rows: Sequence[int],
        directives: Sequence[Directive | None],
    ) -> Tensor:
        """A token for each row of the cache, which grows: logits [rows, vocabulary]."""
        mask, positions = padded.next(self.device)
        given, starts = torch.tensor(ids, device=self.device)[:, None], list(range(len(ids) + 1))
        logits, _ = self._forward(directives, rows, starts, given, positions, mask, padded.cache)
        padded.grown()
        return logits

    def _forward(
        self,
        directives: Sequence[Directive | None],
        rows: Sequence[int],
        starts: Sequence[int],
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: Any,
    ) -> tuple[Tensor, Any]:
        self._tell(directives, rows, starts, positions)
        places = {"position_ids": positions.view(ids.shape)} if self._places else {}
        try:
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **places,
                **self._extras,
            )
        finally:
            for tap in self._taps.values():
                tap.batch = None
        self.count += 1
        logits = out.logits[:, -1].index_fill(-1, self._never, -torch.inf)
        return logits, getattr(out, "past_key_values", None)

    def _tell(
        self,
        directives: Sequence[Directive | None],
        rows: Sequence[int],
        starts: Sequence[int],
        positions: Tensor,
    ) -> None:
        """Tell every tap which tokens are whose: worked out anew only when the requests change."""
        asked, shape = list(directives), (list(rows), list(starts))
        same = shape == self._told[1] and len(asked) == len(self._told[0])
        if same and all(map(operator.is_, asked, self._told[0])):
            for name, batch in self._batches.items():
                self._batches[name] = None if batch is None else batch.later(positions)
        else:
            self._batches = {n: batch_of(n, asked, rows, starts, positions) for n in self._taps}
            self._told = asked, shape
        for name, tap in self._taps.items():
            tap.batch = self._batches[name]

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Two short prompts, alone and in one batch: ValueError unless they come out the same."""
        size = self._model.config.get_text_config().vocab_size
        prompts = [[i % size for i in range(3, 3 + n)] for n in (3, 6)]
        padded = Padded()
        for ids in prompts:
            _, cache = self.prompt(ids)
            check(cache)
            padded.join([(cache, len(ids))])
        together = self.token([2, 2], padded, [0, 0], [None, None]).float()
        alone = torch.cat([self.prompt([*ids, 2])[0] for ids in prompts]).float()
        shown = alone.isfinite()
        together, alone = together[shown], alone[shown]
        off = float((together - alone).abs().max() / alone.abs().max().clamp_min(1))
        most = 1e-3 if self._model.dtype == torch.float32 else 0.1
        if not off <= most:
            raise ValueError(
                f"the model gives other logits to a prompt in a batch than to the same prompt "
                f"alone (relative difference {off:.1g}; up to {most:g} is rounding), so requests "
                "cannot be served together"
            )
