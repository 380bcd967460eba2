"""SAEs that are right, and the mistakes of loaders planted into them, on the bundled model.

`tests/test_verify.py` holds `verify` to them, and `benchmarks/planted_faults.py` prints the table
of docs/verify.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from saert.activations import JumpReLU, ReLU, TopK
from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.verify import verify
from saert.hub.verifying.readings import changed
from saert.own_text import own_text
from saert.sae import SAE
from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives.base import Batch
from saert.train.objectives.topk import TopKObjective
from saert.train.training import OptimiserConfig, Training, unit
from saert.transforms import DatasetScale, InputTransform, LayerNorm, NoTransform, UnitNorm

TEXT = {"rows": 8, "context": 48}


@cache
def model() -> Any:
    return bundled.model()


@cache
def rows() -> Tensor:
    """Text of the model's own, int64 [rows, context]."""
    return own_text(model(), 0, **TEXT)


def measured(sae: SAE, **more: Any) -> SAE:
    """An SAE that declares what it has."""
    sae.metadata = {"base_model": bundled.BASE_MODEL, "declared": {}}
    found = verify(sae, model(), rows(), on_mismatch="report")
    facts = {"l0": found["l0"].measured, "fvu": found["fvu"].measured}
    sae.metadata["declared"] = facts | more
    return sae


# -- right ones ----------------------------------------------------------------------------------


@cache
def topk() -> SAE:
    return bundled.sae("resid_post.2")


@cache
def transcoder() -> SAE:
    return bundled.sae("mlp_in.2")


@cache
def jumprelu() -> SAE:
    """The bundled SAE with the threshold that k = 16 amounts to."""
    sae = topk()
    code = sae.encode(hidden("resid_post.2", len(rows())))
    level = code.values[:, -1].median().repeat(sae.num_latents)
    return measured(changed(sae, activation=JumpReLU(level)))


@cache
def uneven() -> SAE:
    """The same with decoder rows of lengths from a half to two, made up for in the encoder."""
    sae = jumprelu()
    size = torch.exp2(torch.rand(sae.num_latents, generator=torch.manual_seed(0)) * 2 - 1)
    return measured(
        changed(
            sae,
            W_enc=sae.W_enc / size[:, None],
            W_dec=sae.W_dec * size[:, None],
            b_enc=sae.b_enc / size,
            activation=JumpReLU(sae.activation.threshold / size),
        )
    )


@cache
def subtracting() -> SAE:
    """The same function as the bundled SAE, with b_dec subtracted first."""
    sae = topk()
    return changed(sae, b_enc=sae.b_enc + sae.W_enc @ sae.b_dec, subtract_b_dec=True)


@cache
def scaled() -> SAE:
    """The same function as the bundled SAE, in units of a data set."""
    sae, c = topk(), 0.3
    return changed(sae, b_enc=sae.b_enc * c, b_dec=sae.b_dec * c, input_transform=DatasetScale(c))


@cache
def layer_norm() -> SAE:
    return trained("resid_post.2", 256, TopKObjective(k=16), LayerNorm())


@cache
def square() -> SAE:
    return trained("resid_post.1", 128, TopKObjective(k=8), unit_rows=True)


@cache
def mlp_out() -> SAE:
    return trained("mlp_out.1", 256, TopKObjective(k=16))


RIGHT: dict[str, Callable[[], SAE]] = {
    one.__name__: one
    for one in (
        topk, transcoder, jumprelu, uneven, subtracting, scaled, layer_norm, square, mlp_out,
    )
}  # fmt: skip


@cache
def hidden(at: str, count: int = 64) -> Tensor:
    where = Hookpoint.parse(at)
    text = own_text(model(), 0, **(TEXT | {"rows": count}))
    found = capture(model(), text, [where])[where].view(*text.shape, -1)
    return found[:, 1:].flatten(0, 1)


def trained(
    at: str,
    num_latents: int,
    objective: TopKObjective,
    transform: InputTransform | None = None,
    steps: int = 100,
    **more: Any,
) -> SAE:
    """A small dictionary of a few seconds, and what it declares."""
    transform = transform or NoTransform()
    x = transform(hidden(at)).x
    draw = torch.Generator().manual_seed(0)
    W = unit(torch.randn(num_latents, x.shape[1], generator=draw))
    d = Dictionary(W, W.clone(), torch.zeros(num_latents), x.mean(0))
    training = Training(d, objective, OptimiserConfig(lr=3e-3, dead_tokens=10_000), steps)
    for number in range(steps):
        part = x[torch.randint(len(x), (512,), generator=draw)]
        training.step(Batch.of(part, part, Mesh()), number)
    whole = d.whole()
    tensors = (whole[name].detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    sae = SAE.from_weights(
        *tensors, activation=objective.activation(whole), hookpoint=at, input_transform=transform,
        subtract_b_dec=d.subtract_b_dec,
    )  # fmt: skip
    return measured(sae, **({"unit_norm_decoder": True} if more else {}))


# -- wrong ones ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A mistake, the SAE it is made with, and what the cause has to say (a pattern)."""

    name: str
    right: str
    plant: Callable[[SAE], SAE]
    cause: str

    def sae(self) -> SAE:
        """The SAE with the mistake, and the declaration of the one without."""
        right = RIGHT[self.right]()
        wrong = self.plant(right)
        wrong.metadata = copy.deepcopy(dict(right.metadata))
        return wrong

    def model(self) -> Any:
        if self.name != "another model":
            return model()
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(model().config).eval()


def at(hookpoint: str, **more: Any) -> Callable[[SAE], SAE]:
    return lambda sae: changed(sae, hookpoint=Hookpoint.parse(hookpoint), **more)


def transform(other: InputTransform) -> Callable[[SAE], SAE]:
    return lambda sae: changed(sae, input_transform=other)


def active(how: Callable[[SAE], Any]) -> Callable[[SAE], SAE]:
    return lambda sae: changed(sae, activation=how(sae))


def thresholds(factor: float) -> Callable[[SAE], SAE]:
    return active(lambda sae: JumpReLU(sae.activation.threshold * factor))


def with_b_dec(subtract: bool) -> Callable[[SAE], SAE]:
    return lambda sae: changed(sae, subtract_b_dec=subtract)


def shuffled(sae: SAE) -> SAE:
    order = torch.randperm(sae.num_latents, generator=torch.manual_seed(0))
    return changed(sae, W_dec=sae.W_dec[order])


def normalised(sae: SAE) -> SAE:
    return changed(sae, W_dec=unit(sae.W_dec.detach()))


def _faults() -> Iterator[Fault]:
    k = r"TopK\(k=16\)"
    yield Fault("TopK read as ReLU", "topk", active(lambda sae: ReLU()), k)
    yield Fault("TopK of a transcoder read as ReLU", "transcoder", active(lambda _: ReLU()), "TopK")
    for wrong in (64, 32, 4):
        yield Fault(f"k = {wrong} instead of 16", "topk", active(lambda _, n=wrong: TopK(n)), k)
    yield Fault("thresholds dropped", "jumprelu", active(lambda _: ReLU()), "one threshold|TopK")
    yield Fault("thresholds x 10", "jumprelu", thresholds(10), "thresholds x 0.1")
    yield Fault("thresholds / 10", "jumprelu", thresholds(0.1), "thresholds x 10")
    logarithms = active(lambda sae: JumpReLU(sae.activation.threshold.log()))
    yield Fault("log thresholds not undone", "jumprelu", logarithms, r"exp\(thresholds\)")
    yield Fault("the layer before", "topk", at("resid_post.1"), "read at resid_post.2")
    yield Fault("a layer far away", "topk", at("resid_post.0"), "read at resid_post.2")
    yield Fault("resid_pre for resid_post", "topk", at("resid_pre.2"), "read at resid_post.2")
    yield Fault("resid_mid for resid_post", "topk", at("resid_mid.2"), "read at resid_post.2")
    yield Fault("mlp_out read at resid_post", "mlp_out", at("resid_post.1"), "read at mlp_out.1")
    yield Fault("resid_post read at mlp_out", "topk", at("mlp_out.2"), "read at resid_post.2")
    into = at("resid_mid.2")
    yield Fault("transcoder reads before the norm", "transcoder", into, "read at mlp_in.2")
    into = at("mlp_in.2", target_hookpoint=Hookpoint.parse("resid_post.2"))
    yield Fault("transcoder writes elsewhere", "transcoder", into, "written at mlp_out.2")
    yield Fault("layer norm forgotten", "layer_norm", transform(NoTransform()), "LayerNorm")
    yield Fault("layer norm added", "topk", transform(LayerNorm()), "transform none")
    yield Fault("unit norm added", "topk", transform(UnitNorm()), "transform none")
    yield Fault("dataset scale twice as large", "scaled", transform(DatasetScale(0.6)), r"\(0.3\)")
    yield Fault("dataset scale half as large", "scaled", transform(DatasetScale(0.15)), r"\(0.3\)")
    yield Fault("dataset scale forgotten", "scaled", transform(NoTransform()), "DatasetScale")
    yield Fault("b_dec subtracted", "topk", with_b_dec(True), "b_dec not subtracted")
    yield Fault("b_dec not subtracted", "subtracting", with_b_dec(False), "b_dec subtracted")
    lost = lambda sae: changed(sae, b_dec=torch.zeros_like(sae.b_dec))  # noqa: E731
    yield Fault("b_dec lost", "topk", lost, "b_dec")
    turned = lambda sae: changed(sae, W_enc=sae.W_enc.T.contiguous())  # noqa: E731
    yield Fault("W_enc transposed (square)", "square", turned, "W_enc transposed")
    turned = lambda sae: changed(sae, W_dec=sae.W_dec.T.contiguous())  # noqa: E731
    yield Fault("W_dec transposed (square)", "square", turned, "W_dec transposed")
    yield Fault("decoder rows normalised alone", "uneven", normalised, "decoder rows")
    yield Fault("decoder shuffled", "topk", shuffled, "do not belong together")
    yield Fault("another model", "topk", lambda sae: changed(sae), "another model")


FAULTS = tuple(_faults())
