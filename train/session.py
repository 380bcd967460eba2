"""One training run from a configuration to a folder that can be published.

    FOLDER/run.json             configuration, versions, git commit, what the data and model were
           checkpoints/         to go on from, pruned
           metrics.jsonl tensorboard/
           saes/resid_post.6/   cfg.json, sae_weights.safetensors, metrics.json, training.json and
                                a card

The same command goes on with a stopped run and leaves a finished one alone; another configuration
in the same folder is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from saert.hub import bundled
from saert.hub.format import save
from saert.hub.load import load_string
from saert.measure.reports.evaluate import Metrics, evaluate
from saert.sae import SAE
from saert.train.cache import Cache, write_atomically
from saert.train.cards import card
from saert.train.config import ConfigError, TrainConfig
from saert.train.mesh import Mesh
from saert.train.record import (
    alone_in,
    as_before,
    check_folder,
    model_facts,
    public_name,
    record,
)
from saert.train.record import write as write_record
from saert.train.report import Report
from saert.train.row_stream import RowStream
from saert.train.rows import Prefetched, TokenRows, heldout_rows, special_mask
from saert.train.run import Job, Plan, Run, Stream
from saert.train.stream import ActivationStream
from saert.train.text import Documents
from saert.train.training import DEAD_TOKENS

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}  # fmt: skip


class Session:
    """What a run needs, made from its configuration when first used."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: str = "cpu",
        mesh: Mesh | None = None,
        cache: Path | None = None,
        cache_gb: float = 10.0,
    ) -> None:
        self.config, self.device, self.mesh = config, device, mesh or Mesh()
        self.cache_folder, self.cache_gb = cache, cache_gb

    @cached_property
    def model(self) -> Any:
        """The language model, frozen, in evaluation mode."""
        c = self.config.model
        if c.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {c.dtype!r}, expected one of {', '.join(DTYPES)}")
        if c.name == "bundled":
            model = bundled.model()
        else:  # by commit: a branch may have moved since its configuration was read
            commit = getattr(self.facts, "_commit_hash", None) or c.revision
            model = AutoModelForCausalLM.from_pretrained(
                c.name, revision=commit, dtype=DTYPES[c.dtype]
            )
        return model.eval().requires_grad_(False).to(self.device)

    @cached_property
    def facts(self) -> Any:
        """The language model's configuration; a run from a complete cache needs no more of it."""
        c = self.config.model
        name = bundled.MODEL if c.name == "bundled" else c.name
        return AutoConfig.from_pretrained(name, revision=c.revision)

    @cached_property
    def tokenizer(self) -> Any:
        c = self.config.model
        if c.name == "bundled":
            return bundled.tokenizer()
        return AutoTokenizer.from_pretrained(c.name, revision=c.revision)

    @cached_property
    def documents(self) -> Documents:
        return Documents(self.config.data)

    @property
    def special(self) -> Callable[[Tensor], Tensor]:
        return partial(special_mask, tokenizer=self.tokenizer)

    @cached_property
    def heldout(self) -> Tensor | None:
        """Rows that training never sees, or None if no text is held out."""
        if not self.config.data.holdout:
            return None
        count, vocabulary = self.config.evaluation.rows, len(self.tokenizer)
        return heldout_rows(self.config.data, self.tokenizer, count, vocabulary)

    def check_context(self) -> None:
        """Raise ConfigError if the rows are longer than what the model was made for."""
        longest = getattr(self.facts.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.config.data.context > longest:
            raise ConfigError(
                f"data.context is {self.config.data.context}, but the model was made for at most "
                f"{longest} positions"
            )

    def jobs(self) -> list[Job]:
        """One for each hookpoint."""
        sae, start = self.config.sae, self._start()
        names = [str(read) for read, _ in sae.pairs()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"sae.hookpoints has two dictionaries that read {twice[0]}, after which both would "
                "be named; train them in two runs"
            )
        return [
            Job(
                name=str(read),
                hookpoint=read,
                target=write,
                num_latents=sae.num_latents or round(sae.expansion * self._width(read)),
                objective=self.config.objective,
                seed=self.config.seed,
                skip=sae.skip,
                normalise=sae.normalise,
                start=start,
            )
            for read, write in sae.pairs()
        ]

    def _width(self, read: Any) -> int:
        width = read.resolve(self.model).width
        if width is None:
            raise ConfigError(f"the width of {read} is not known; set sae.num_latents")
        return int(width)

    def _start(self) -> SAE | None:
        source, pairs = self.config.sae.init, self.config.sae.pairs()
        if source is None:
            return None
        sae = load_string(source)
        own = (sae.hookpoint, sae.target_hookpoint)
        if sae.hookpoint is not None and pairs != [own]:
            raise ConfigError(
                f"sae.init reads {sae.hookpoint} and sae.hookpoints are "
                f"{', '.join(self.config.sae.hookpoints)}; start that hookpoint alone"
            )
        return sae

    def stream(self, jobs: list[Job]) -> Stream:
        """The batches that those jobs need."""
        c = self.config
        rows = TokenRows(
            self.documents, self.tokenizer, c.data.context, c.data.bos, len(self.tokenizer)
        )
        sites = list(dict.fromkeys(s for j in jobs for s in (j.hookpoint, j.target) if s))
        wants = {job.objective.wants for job in jobs} - {None}
        model = partial(getattr, self, "model")
        if "downstream" in wants:
            if wants != {"downstream"} or self.cache_folder is not None:
                raise ConfigError(
                    "an objective that runs the model on its reconstruction trains on whole rows: "
                    "it goes with no cache, and with no objective that wants gradients"
                )
            return RowStream(model, rows, sites, c.data.context, c.stream, self.mesh)
        gradient = "gradient" in wants
        stream = ActivationStream(
            model,
            rows,
            sites,
            c.data.context,
            c.stream,
            special=self.special,
            mesh=self.mesh,
            seed=c.seed,
            wants_gradient=gradient,
            cache=self._cache([str(s) for s in sites], gradient),
        )
        stream.rows = Prefetched(rows, stream.buffer_rows)
        return stream

    def _cache(self, sites: list[str], gradient: bool) -> Cache | None:
        if self.cache_folder is None:
            return None
        c = self.config
        stream, sources = asdict(c.stream), [public_name(s) for s in c.data.source]
        facts = {
            "model": {"dtype": c.model.dtype, **model_facts(c, self.facts)},
            "data": {**asdict(c.data), "source": sources, **self.documents.facts()},
            "hookpoints": sites,
            "gradient": gradient,
            # a token that is an outlier anywhere is served nowhere
            "max_norm_over": None if c.stream.max_norm is None else sites,
            **{
                key: stream[key]
                for key in ("buffer_tokens", "exclude_special", "max_norm", "lanes")
            },
        }
        facts = json.loads(json.dumps(facts))  # as they will be read
        return Cache(self.cache_folder, self.cache_gb, facts, c.data.context)

    def plan(self) -> Plan:
        c = self.config
        if c.sae.precision == "bf16" and self.device == "cpu" and not _has_bf16():
            raise ConfigError(
                "sae.precision is bf16, but this processor has no instructions for it and would "
                "be slower than with fp32; use fp32"
            )
        dead_tokens = c.optimiser.dead_tokens
        if dead_tokens is None:
            dead_tokens = min(DEAD_TOKENS, c.tokens // 20)
        return Plan(
            steps=c.steps,
            optimiser=replace(c.optimiser, dead_tokens=dead_tokens),
            dtype=torch.float64 if c.sae.precision == "fp64" else torch.float32,
            compute=torch.bfloat16 if c.sae.precision == "bf16" else None,
            tf32=c.sae.precision == "tf32",
            device=self.device,
            save_every=c.checkpoint.every,
            keep=c.checkpoint.keep,
        )


def train(
    config: TrainConfig,
    folder: Path,
    *,
    device: str = "cpu",
    cache: Path | None = None,
    cache_gb: float = 10.0,
    progress: bool = True,
    tensorboard: bool = True,
    wandb: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any] | None]:
    """Train, evaluate and write `folder`; goes on from its newest checkpoint.

    Returns the held-out metrics of each dictionary by name (None where no text is held out).

    Raises:
        ConfigError: settings that contradict each other, or another run's folder.
        TrainingError, CheckpointError: see `saert.train.run`; the last checkpoint is good.
        Interrupted: after SIGINT or SIGTERM, everything saved.
    """
    check_device(device)
    if tensorboard and find_spec("tensorboard") is None:
        raise ImportError("tensorboard is not installed: pip install 'saert[train]'")
    mesh = Mesh.of(config.shards, device)
    pinned = as_before(folder, config)
    session = Session(pinned, device=device, mesh=mesh, cache=cache, cache_gb=cache_gb)
    session.check_context()
    found = record(config, session.documents.facts(), session.facts)
    check_folder(folder, found)
    jobs = session.jobs()
    if finished := _finished(folder, jobs):
        say(f"{folder} is finished; nothing to do")
        return finished
    if mesh.is_first:
        _ = session.heldout  # too little text is an error now, not after the last step
        write_record(folder, found)
    run = Run(jobs, session.stream(jobs), session.plan(), folder / "checkpoints", mesh)
    if run.step:
        say(f"going on from step {run.step:,} of {config.steps:,}")
    with ExitStack() as stack:
        if mesh.is_first:
            stack.enter_context(alone_in(folder))
        report = None
        if mesh.is_first:
            report = stack.enter_context(
                Report(
                    folder,
                    found["config"],
                    total=config.steps * config.stream.batch_tokens,
                    batch_tokens=config.stream.batch_tokens,
                    done=run.step,
                    progress=progress,
                    tensorboard=tensorboard,
                    wandb=wandb,
                )
            )
        _train(run, session, report)
        run.calibrate()
        return _publishable(run, session, folder, found, report)


def _train(run: Run, session: Session, report: Report | None) -> None:
    """To the end, with an evaluation every so many steps."""
    every = session.config.evaluation.every or run.plan.steps
    while run.step < run.plan.steps:
        if run.step and run.step % every == 0:  # before going on: a resumed run may have missed it
            for name, sae in run.saes().items():
                if report is not None and session.heldout is not None:
                    report.evaluation(run.step, name, _measure(session, sae))
        run.train(
            None if report is None else report.step, until=run.step - run.step % every + every
        )


def _publishable(
    run: Run, session: Session, folder: Path, record: Mapping[str, Any], report: Report | None
) -> dict[str, dict[str, Any] | None]:
    """Evaluate and write every SAE; the folder's last step."""
    found: dict[str, dict[str, Any] | None] = {}
    for member in run.members:
        sae = member.sae()  # on every rank
        name = member.job.name
        if report is None:
            continue
        metrics: dict[str, Any] | None = None
        if session.heldout is not None:
            measured = _measure(session, sae)
            report.evaluation(run.step, name, measured)
            metrics = json.loads(json.dumps(asdict(measured)))
        sae.metadata = metadata(session, record, metrics)
        _write(sae, name, folder / "saes" / name, record, metrics)
        found[name] = metrics
    session.mesh.wait()
    return found


def check_device(device: str) -> None:
    """Raise ConfigError for a device that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: this machine or this build of torch has no CUDA")


def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _measure(session: Session, sae: SAE) -> Metrics:
    assert session.heldout is not None
    special = session.special if session.config.stream.exclude_special else None
    rows = session.config.stream.forward_rows
    return evaluate(session.model, sae, session.heldout, rows, special)


def metadata(
    session: Session, record: Mapping[str, Any], metrics: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What an SAE's cfg.json says of where it comes from and how good it is."""
    c = session.config
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    text = session.facts.get_text_config()
    return {
        "base_model": record["model"]["name"],
        "base_model_revision": record["model"]["commit"],
        "base_model_config": {name: getattr(text, name, None) for name in names},
        "context_size": c.data.context,
        "training_architecture": c.objective.name,
        "training": {"tokens": c.tokens, "objective": record["config"]["objective"]},
        "metrics": None if metrics is None else dict(metrics),
    }


def _write(
    sae: SAE, name: str, folder: Path, record: Mapping[str, Any], metrics: Mapping[str, Any] | None
) -> None:
    save(sae, folder)
    for file, content in (("training.json", record), ("metrics.json", metrics)):
        write_atomically(folder / file, (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(folder / "README.md", card(sae, name, record, metrics).encode())  # the last


def _finished(folder: Path, jobs: list[Job]) -> dict[str, dict[str, Any] | None]:
    """The metrics of all dictionaries if all are written, else nothing."""
    found = {}
    for job in jobs:
        at = folder / "saes" / job.name
        if not (at / "README.md").is_file():
            return {}
        found[job.name] = json.loads((at / "metrics.json").read_text(encoding="utf-8"))
    return found
