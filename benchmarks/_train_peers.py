"""sparsify, SAELens and dictionary_learning, training: whole runs, and whole steps.

A run is the library's own trainer on recorded activations, with its own defaults. Two settings
bend, because a run here is short: a warm-up of 1,000 steps becomes a tenth of the run, if that is
less, and `dead_tokens` may replace the library's own idea of a dead latent. What a library would
save is what is measured.

A step is everything that the trainer does for one batch, logging to wandb and progress bars aside.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._inputs import Inputs
from benchmarks._peers import _agree, _coder, _dictionary_weights, _fill, _saelens_weights
from benchmarks._timing import NotRun, Run
from benchmarks._training import computes_in_half

WARMUP = 1000  # steps: the default of sparsify's Adam and of dictionary_learning
ALPHA = 1 / 32  # AuxK's weight where sparsify, whose default is 0, is asked for AuxK


@dataclass(frozen=True, eq=False)
class Task:
    """Recorded activations x [steps · batch, d], in the order in which everybody gets them.

    `dead_tokens`: silent for so long is dead; None: the library's own threshold.
    """

    x: Tensor
    batch: int
    num_latents: int
    k: int
    dead_tokens: int | None = None

    @property
    def steps(self) -> int:
        return len(self.x) // self.batch

    @property
    def warmup(self) -> int:
        return min(WARMUP, self.steps // 10)

    def batches(self) -> Iterator[Tensor]:
        return iter(self.x.split(self.batch))


Trained = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [T, d] -> reconstruction [T, d], activations [T, num_latents]"""


@dataclass(frozen=True)
class Library:
    """One way to train a TopK SAE.

    Attributes:
        rate: the library's default for a task.
        train: (task, seed, rate) -> the trained SAE.
        settings: what is used, in a sentence.
    """

    name: str
    rate: Callable[[Task], float]
    train: Callable[[Task, int, float], Trained]
    settings: str


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what peers print and draw; ImportError becomes NotRun."""
    precision = torch.get_float32_matmul_precision()  # sparsify's trainer sets it for good
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except ImportError as error:
        raise NotRun(f"not installed: {error}") from error
    finally:
        torch.set_float32_matmul_precision(precision)


# -- whole runs ------------------------------------------------------------------------------------


class _Recorded(nn.Module):
    """A model whose token ids are row numbers and whose one layer looks the activations up: the
    least that sparsify's Trainer accepts for a language model."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.site = _Lookup(x)
        self.device = x.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.site(input_ids)
        return found


class _Lookup(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, ids: Tensor) -> Tensor:
        return self.x[ids]


def _sparsify(optimizer: str) -> Callable[[Task, int, float], Trained]:
    def train(task: Task, seed: int, rate: float) -> Trained:
        if not task.x.is_cuda:
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        with quietly(), tempfile.TemporaryDirectory() as folder:
            from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

            more: dict[str, Any] = {}
            if task.dead_tokens is not None:
                more = {"dead_feature_threshold": task.dead_tokens, "auxk_alpha": ALPHA}
            config = TrainConfig(
                SparseCoderConfig(num_latents=task.num_latents, k=task.k),
                batch_size=1,  # one "sequence" is one batch of activations
                optimizer=optimizer,
                lr=rate,
                lr_warmup_steps=task.warmup,
                hookpoints=["site"],
                init_seeds=[seed],
                save_every=task.steps + 1,
                save_dir=folder,
                log_to_wandb=False,
                **more,
            )
            rows = torch.arange(len(task.x)).view(-1, task.batch)
            Trainer(config, [{"input_ids": row} for row in rows], _Recorded(task.x)).fit()
            coder = SparseCoder.load_from_disk(Path(folder) / "unnamed" / "site")

        def trained(x: Tensor) -> tuple[Tensor, Tensor]:
            code = coder.encode(x)
            f = x.new_zeros(len(x), task.num_latents)
            f.scatter_(1, code.top_indices, code.top_acts)
            return coder.decode(code.top_acts, code.top_indices), f

        return trained

    return train


def _saelens(task: Task, seed: int, rate: float) -> Trained:
    with quietly():
        from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig

        torch.manual_seed(seed)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=task.x.shape[1], d_sae=task.num_latents, k=task.k)
        )
        config = SAETrainerConfig(
            total_training_samples=len(task.x), train_batch_size_samples=task.batch, lr=rate,
            # LanguageModelSAERunnerConfig.__post_init__; a constant schedule makes no use of it
            lr_end=rate / 10,
        )  # fmt: skip
        if task.dead_tokens is not None:
            config.dead_feature_window = task.dead_tokens // task.batch
        SAETrainer(config, sae, task.batches()).fit()
    sae.eval()

    def trained(x: Tensor) -> tuple[Tensor, Tensor]:
        f = sae.encode(x)
        return sae.decode(f), f

    return trained


def _dictionary_learning(task: Task, seed: int, rate: float) -> Trained:
    with quietly():
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = TopKTrainer(
            steps=task.steps, activation_dim=task.x.shape[1], dict_size=task.num_latents, k=task.k,
            layer=0, lm_name="", lr=rate, warmup_steps=task.warmup, seed=seed, device="cpu",
        )  # fmt: skip
        if task.dead_tokens is not None:
            trainer.dead_feature_threshold = task.dead_tokens
        for step, x in enumerate(task.batches()):  # trainSAE, which only adds logs and files
            trainer.update(step, x)
    coder = trainer.ae

    def trained(x: Tensor) -> tuple[Tensor, Tensor]:
        f = coder.encode(x)
        return coder.decode(f), f

    return trained


def _inverse_root(base: float, num_latents: int) -> float:
    return float(base / (num_latents / 2**14) ** 0.5)


LIBRARIES = (
    Library(
        "sparsify",
        lambda task: _inverse_root(5e-3, task.num_latents),
        _sparsify("signum"),
        "sparsify.Trainer over a look-up of the activations: schedule-free signum (momentum 0.95), "
        "lr 5e-3·√(2¹⁴/n) constant, FVU, no AuxK (auxk_alpha 0), b_dec at the first batch's mean, "
        "unit-norm decoder, weights as its checkpoint holds them.",
    ),
    Library(
        "sparsify, Adam",
        lambda task: _inverse_root(2e-4, task.num_latents),
        _sparsify("adam"),
        'The same with optimizer="adam": lr 2e-4·√(2¹⁴/n), linear warm-up, then linear to 0.',
    ),
    Library(
        "SAELens",
        lambda task: 3e-4,
        _saelens,
        "SAETrainer.fit on TopKTrainingSAE: Adam, lr 3e-4 constant, summed squared error, AuxK "
        "after 1,000 silent steps (coefficient 1, not normalised), gradient norm cut to 1, decoder "
        "rows start at norm 0.1 and are free, activations ranked by their norm, b_dec from 0.",
    ),
    Library(
        "dictionary_learning",
        lambda task: _inverse_root(2e-4, task.num_latents),
        _dictionary_learning,
        "TopKTrainer.update, as trainSAE calls it (normalize_activations False): Adam, lr "
        "2e-4·√(2¹⁴/n), linear warm-up, then constant, summed squared error, AuxK 1/32 after 10M "
        "silent tokens, gradient norm cut to 1, unit-norm decoder, b_dec at the first batch's "
        "geometric median.",
    ),
)


# -- whole steps -----------------------------------------------------------------------------------


def steps(half: bool, dead: float) -> dict[str, Callable[[Inputs], Run]]:
    """The peers' steps. `half`: in bfloat16 arithmetic; `dead`: the part of latents kept dead."""
    return {
        "sparsify": lambda i: _sparsify_step(i, "signum", half, dead),
        "sparsify, Adam": lambda i: _sparsify_step(i, "adam", half, dead),
        "dictionary_learning": lambda i: _dictionary_learning_step(i, half, dead),
        "SAELens": lambda i: _saelens_step(i, half, dead),
    }


def keep_dead(since: Tensor, dead: float) -> None:
    """Let the first latents have been silent for longer than any threshold."""
    if dead:
        since[: int(dead * len(since))] = 10**9


def _sparsify_step(i: Inputs, optimizer: str, half: bool, dead: float) -> Run:
    if half != i.x.is_cuda:
        raise NotRun("its forward is in bfloat16 on CUDA devices, and nowhere else")
    coder, _ = _coder(i)
    x, n = i.x, i.shape.n
    since = torch.zeros(n, device=x.device, dtype=torch.long)
    did_fire = torch.zeros(n, device=x.device, dtype=torch.bool)
    alpha = ALPHA if dead else 0.0  # TrainConfig.auxk_alpha's default
    schedulers: list[Any] = []
    # Trainer.__init__
    if optimizer == "adam":
        from transformers import get_linear_schedule_with_warmup

        rate = _inverse_root(2e-4, n)
        optimiser: Any = torch.optim.Adam([{"params": coder.parameters(), "lr": rate}])
        schedulers = [get_linear_schedule_with_warmup(optimiser, WARMUP, 100_000)]
    else:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        group = {"params": coder.parameters(), "lr": _inverse_root(5e-3, n)}
        optimiser = ScheduleFreeWrapper(SignSGD([group]), momentum=0.95)
        optimiser.train()

    def step() -> float:
        # Trainer.fit, hook()
        coder.set_decoder_norm_to_unit_norm()
        mask = since > 10_000_000 if alpha > 0 else None
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x, y=x, dead_mask=mask, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        fvu = float(out.fvu.detach())
        if alpha > 0:
            float(out.auxk_loss.detach())
        (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).div(1).backward()
        # Trainer.fit, "Check if we need to actually do a training step"
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        with torch.no_grad():
            since.add_(len(x))
            since[did_fire] = 0
            did_fire.zero_()
            keep_dead(since, dead)
        return fvu

    return step


def _dictionary_learning_step(i: Inputs, half: bool, dead: float) -> Run:
    from dictionary_learning.trainers.top_k import TopKTrainer

    if half and not i.x.is_cuda:
        raise NotRun("its trainSAE uses bfloat16 on CUDA devices only")
    trainer = TopKTrainer(
        steps=10**9, activation_dim=i.shape.d, dict_size=i.shape.n, k=i.shape.k, layer=0,
        lm_name="", device=str(i.x.device),
    )  # fmt: skip
    _fill(trainer.ae, _dictionary_weights(i))
    _agree(i, trainer.ae)

    def step() -> float:
        keep_dead(trainer.num_tokens_since_fired, dead)
        with torch.autocast(i.x.device.type, torch.bfloat16, enabled=half):  # trainSAE
            loss: float = trainer.update(2 * WARMUP, i.x)  # past what happens at the start only
        return loss

    return step


def _saelens_step(i: Inputs, half: bool, dead: float) -> Run:
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    if half and not computes_in_half(i.x.device):
        raise NotRun("this CPU has no bfloat16 instructions")
    device = str(i.x.device)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=i.shape.d, d_sae=i.shape.n, k=i.shape.k, device=device,
        )
    )  # fmt: skip
    _fill(sae, _saelens_weights(i))
    _agree(i, sae)
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=i.shape.tokens, device=device,
        autocast=half, lr_end=3e-5,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(()))

    def step() -> float:
        if dead:
            keep_dead(trainer.n_forward_passes_since_fired, dead)
        found: float = trainer.step(i.x).loss.item()
        return found

    return step
