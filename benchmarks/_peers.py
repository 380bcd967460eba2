"""sparsify, dictionary_learning and SAELens, whichever are installed, on saert's weights.

Each runs its own modules, the loss of its own training code and Adam as its trainer makes it.
Inference is `encode` then `decode`; a training step is forward, loss, backward and Adam, as in
`_training`. Before it is timed a peer has to reconstruct the inputs as saert does.

Where no CUDA device is, sparsify is told to leave its Triton kernels alone.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._checks import CheckRed, clear_tokens
from benchmarks._inputs import Inputs
from benchmarks._ops import Contender
from benchmarks._timing import NotRun, Run
from benchmarks._training import Step
from saert.kernels.decode import sparse_decode
from saert.kernels.encode import encode_topk

DISTRIBUTIONS = ("eai-sparsify", "dictionary-learning", "sae-lens")
TOLERANCE = 1e-3


def contenders(op: str) -> list[Contender]:
    """The peers that know an op."""
    named = {
        "inference": {
            "sparsify": _sparsify,
            "dictionary_learning": _dictionary_learning,
            "SAELens": _saelens,
        },
        "training": {
            "sparsify": _sparsify_step,
            "dictionary_learning": _dictionary_learning_step,
            "SAELens": _saelens_step,
        },
    }
    return [Contender(name, "peer", _guarded(make)) for name, make in named.get(op, {}).items()]


def _guarded(make: Callable[[Inputs], Run]) -> Callable[[Inputs], Run]:
    def guarded(i: Inputs) -> Run:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # they print while they are imported
                return make(i)
        except ImportError as error:
            raise NotRun(f"not installed: {error}") from error

    return guarded


def _agree(i: Inputs, reconstruct: Callable[[Tensor], Tensor]) -> None:
    """Raise CheckRed unless a peer's reconstruction is saert's, near ties aside."""
    x = i.x[clear_tokens(i)[0]]
    code = encode_topk(x, i.W_enc, i.b_enc, i.shape.k, b_dec=i.b_dec)
    ours = sparse_decode(code.indices, code.values, i.W_dec, i.b_dec)
    with torch.no_grad():
        theirs = reconstruct(x)
    if not torch.allclose(theirs, ours, atol=TOLERANCE, rtol=TOLERANCE):
        apart = float((theirs - ours).abs().max())
        raise CheckRed(f"its reconstruction is {apart:.1e} from saert's")


def _fill(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy into a module's own tensors, which keep their memory layout."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


# -- sparsify --------------------------------------------------------------------------------------


def _coder(i: Inputs) -> Any:
    if not i.x.is_cuda:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=i.shape.n, k=i.shape.k)
    coder = SparseCoder(i.shape.d, config, i.x.device, i.W_enc.dtype)
    weights = {"encoder.weight": i.W_enc, "encoder.bias": i.b_enc}
    _fill(coder, weights | {"W_dec": i.W_dec, "b_dec": i.b_dec})

    def reconstruct(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return coder.decode(found.top_acts, found.top_indices)

    _agree(i, reconstruct)
    return coder, reconstruct


def _sparsify(i: Inputs) -> Run:
    _, reconstruct = _coder(i)
    return lambda: reconstruct(i.x)


def _sparsify_step(i: Inputs) -> Run:
    coder, _ = _coder(i)
    parameters = list(coder.parameters())
    # sparsify/trainer.py: Adam over the parameters, out.fvu as the loss
    return Step(parameters, lambda: coder(i.x).fvu, torch.optim.Adam(parameters, lr=2e-4))


# -- dictionary_learning ---------------------------------------------------------------------------


def _dictionary_weights(i: Inputs) -> dict[str, Tensor]:
    weights = {"encoder.weight": i.W_enc, "encoder.bias": i.b_enc}
    return weights | {"decoder.weight": i.W_dec.T, "b_dec": i.b_dec}


def _dictionary_learning(i: Inputs) -> Run:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    coder = AutoEncoderTopK(i.shape.d, i.shape.n, i.shape.k).to(i.x.device, i.W_enc.dtype)
    _fill(coder, _dictionary_weights(i))
    _agree(i, coder)
    return lambda: coder(i.x)


def _dictionary_learning_step(i: Inputs) -> Run:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000, activation_dim=i.shape.d, dict_size=i.shape.n, k=i.shape.k, layer=0,
        lm_name="", device=str(i.x.device),
    )  # fmt: skip
    _fill(trainer.ae, _dictionary_weights(i))
    _agree(i, trainer.ae)
    parameters = list(trainer.ae.parameters())
    return Step(parameters, lambda: trainer.loss(i.x, step=0), trainer.optimizer)


# -- SAELens ---------------------------------------------------------------------------------------


def _saelens_weights(i: Inputs) -> dict[str, Tensor]:
    return {"W_enc": i.W_enc.T, "b_enc": i.b_enc, "W_dec": i.W_dec, "b_dec": i.b_dec}


def _saelens_settings(i: Inputs) -> dict[str, Any]:
    return dict(d_in=i.shape.d, d_sae=i.shape.n, k=i.shape.k, device=str(i.x.device))


def _saelens(i: Inputs) -> Run:
    from sae_lens import TopKSAE, TopKSAEConfig

    coder = TopKSAE(TopKSAEConfig(**_saelens_settings(i)))
    _fill(coder, _saelens_weights(i))
    _agree(i, coder)
    return lambda: coder(i.x)


def _saelens_step(i: Inputs) -> Run:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    coder = TopKTrainingSAE(TopKTrainingSAEConfig(**_saelens_settings(i)))
    _fill(coder, _saelens_weights(i))
    _agree(i, coder)
    coder.train()
    nothing_dead = torch.zeros(i.shape.n, dtype=torch.bool, device=i.x.device)
    step = TrainStepInput(i.x, {}, nothing_dead, 0, False)
    parameters = list(coder.parameters())
    adam = torch.optim.Adam(parameters, lr=3e-4, betas=(0.9, 0.999))  # as SAETrainer does
    return Step(parameters, lambda: coder.training_forward_pass(step).loss, adam)
