"""What edits do to a text: the model's own text and the steered one, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from saert.measure.reports.reconstruction import check_rows
from saert.measure.steering.prompt import Pieces, check_room, encode_prompt
from saert.measure.steering.setup import Setup
from saert.measure.steering.stream import CACHE, Stream, check_writer
from saert.measure.steering.watch import Live, check_names, watched
from saert.sae import SAE
from saert.twin import twin

ROWS = 64  # prompt tokens whose distributions are compared at a time
PASS = 256  # prompt tokens whose logits are held at a time, where the model has a cache


@dataclass(frozen=True)
class Token:
    """A token, and what the edits do to its probability, in nats.

    All of it is of the model's own distributions, before temperature, top-p and processors.

    Attributes:
        id, text: `text` is what it adds to the text: "" while a character is incomplete.
        logprob, default_logprob: its log-probability with the edits and without them, after the
            same text. None for the first token of all, which nothing predicts.
        kl: KL(with edits ‖ without) of the distribution it was drawn from.

    A token of the default text has no edits: its change and kl are 0.
    """

    id: int
    text: str
    logprob: float | None
    default_logprob: float | None
    kl: float | None

    @property
    def change(self) -> float | None:
        """How much likelier the edits made it, in nats."""
        if self.logprob is None or self.default_logprob is None:
            return None
        return self.logprob - self.default_logprob


@dataclass(frozen=True)
class Step:
    """A token of each text.

    Attributes:
        prompt: the prompt's tokens, in the first step only.
        default, steered: the new tokens; None once that text has ended.
        live: by source string of the SAE.
        default_ms, steered_ms: median milliseconds per token so far.
    """

    prompt: tuple[Token, ...]
    default: Token | None
    steered: Token | None
    live: Mapping[str, Live]
    default_ms: float
    steered_ms: float


def side_by_side(
    model: Any,
    tokenizer: Any,
    setup: Setup,
    saes: Mapping[str, SAE],
    *,
    ids: Tensor | None = None,
    strict: bool = True,
) -> Iterator[Step]:
    """Two texts from one seed, a token of each at a time: the model's own, and the steered one.

    The texts are those of `model.generate` (`Setup.snippet`). The model is never touched: a twin
    of it is steered (`saert.twin`), with the SAEs that the setup names attached, or all of `saes`
    if it names none. Closing the iterator early leaves nothing behind, and it may be resumed in
    any thread.

    Args:
        saes: by source string, those that `setup.sources` lists at least, each under one name.
        ids: int64 [1, T], tokens to continue instead of `setup.prompt`.
        strict: as for `attach`.

    Raises:
        ValueError, TypeError: a prompt that does not fit, an edit that cannot be meant, an SAE
            that is missing, that is there under two names or that does not fit the model, edits
            that drive the model to NaN.
        NotImplementedError: a model that keeps no cache, or that translates (encoder-decoder).
    """
    if missing := [source for source in setup.sources if source not in saes]:
        raise ValueError(f"{missing[0]} is not among the SAEs given: {', '.join(saes) or 'none'}")
    check_writer(model)
    chosen = {source: saes[source] for source in setup.sources or saes}
    check_names(chosen)
    if ids is None:
        ids = encode_prompt(tokenizer, setup.prompt, setup.chat)["input_ids"]
    elif len(ids := check_rows(model, ids)) != 1:
        raise ValueError(f"ids: found {len(ids)} rows, expected one")
    ids = ids.to(model.device)
    check_room(model, ids.shape[1], setup.sampling.max_new_tokens)
    steered_model = twin(model)
    with watched(steered_model, chosen, setup, strict) as watch:
        # No mode of the thread (no_grad) is held over a yield: the next step may be another's.
        prompt = _prompt_tokens(model, steered_model, tokenizer, ids)
        watch.clear()
        default, steered = (
            _Text(Stream(one, ids, setup.sampling), tokenizer) for one in (model, steered_model)
        )
        bare = Stream(model, ids, setup.sampling)  # reads the steered text
        while not (default.stream.ended and steered.stream.ended):
            theirs = ours = None
            if not default.stream.ended:
                token, text, logits = default.next()
                theirs = _token(token, text, logits, logits)
            if not steered.stream.ended:
                token, text, logits = steered.next()
                ours = _token(token, text, logits, bare.read())
                bare.write(token)
            yield Step(prompt, theirs, ours, watch.live(), default.ms, steered.ms)
            if prompt:
                prompt = ()
                watch.begin("generated")


class _Text:
    """A stream, its text so far, and how long its tokens take."""

    def __init__(self, stream: Stream, tokenizer: Any) -> None:
        self.stream = stream
        self._pieces = Pieces(tokenizer, stream.ids[0].tolist())
        self._times: list[float] = []

    def next(self) -> tuple[int, str, Tensor]:
        """The next token, its piece of text and the logits [1, vocabulary] before the sampling."""
        begun = time.perf_counter()
        logits = self.stream.read()
        token = self.stream.draw(logits)
        self.stream.write(token)
        self._times.append((time.perf_counter() - begun) * 1000)
        return token, self._pieces.add(token, self.stream.ended), logits

    @property
    def ms(self) -> float:
        """Median milliseconds per token."""
        return median(self._times)


@torch.no_grad()
def _prompt_tokens(model: Any, steered: Any, tokenizer: Any, ids: Tensor) -> tuple[Token, ...]:
    """The prompt's tokens; a pass of its own, since `generate` asks for the last logits only."""
    listed = ids[0].tolist()
    numbers: list[tuple[Any, ...]] = [(None, None, None)]
    for new, old in zip(_logits(steered, ids[:, :-1]), _logits(model, ids[:, :-1]), strict=True):
        for some, bare in zip(new.split(ROWS), old.split(ROWS), strict=True):
            said = listed[len(numbers) : len(numbers) + len(some)]
            numbers += zip(*compare(some, bare, said), strict=True)
    pieces = Pieces(tokenizer)
    texts = [pieces.add(token, i == len(listed)) for i, token in enumerate(listed, 1)]
    return tuple(
        Token(token, text, *three)
        for token, text, three in zip(listed, texts, numbers, strict=True)
    )


def _logits(model: Any, ids: Tensor) -> Iterable[Tensor]:
    """Logits [some tokens, vocabulary] of ids [1, T], in order, `PASS` tokens at a time.

    All at once for a model whose cache would not take several tokens, as Mamba's.
    """
    if not ids.numel():
        return
    short = ids.shape[1] <= PASS
    cache, seen = None, 0
    while seen < ids.shape[1]:
        part = ids[:, seen : seen + PASS]
        seen += part.shape[1]
        mask = torch.ones_like(ids[:, :seen])
        held: dict[str, Any] = {} if cache is None else {CACHE: cache}
        out = model(input_ids=part, attention_mask=mask, use_cache=not short, **held)
        cache = getattr(out, CACHE, None)
        if cache is None and not short:
            mask = torch.ones_like(ids)
            yield model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            return
        yield out.logits[0]


def _token(token: int, text: str, steered: Tensor, bare: Tensor) -> Token:
    (logprob,), (default_logprob,), (kl,) = compare(steered, bare, [token])
    return Token(token, text, logprob, default_logprob, kl)


def compare(
    steered: Tensor, bare: Tensor, tokens: Sequence[int]
) -> tuple[list[float], list[float], list[float]]:
    """Log-probabilities of `tokens` under both logits [T, vocabulary], and KL(steered ‖ bare)."""
    wide = torch.float32 if steered.device.type == "mps" else torch.float64
    p, q = (logits.to(steered.device, wide).log_softmax(-1) for logits in (steered, bare))
    chosen = torch.tensor(tokens, device=p.device)[:, None]
    # A token that neither can say (-inf in both) adds nothing; rounding may leave -1e-17.
    kl = (p.exp() * (p - q)).where(p > -torch.inf, 0).sum(-1).clamp_min(0)
    return p.gather(1, chosen)[:, 0].tolist(), q.gather(1, chosen)[:, 0].tolist(), kl.tolist()
