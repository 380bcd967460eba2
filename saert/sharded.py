"""shard: an SAE whose latents are spread over devices or processes, for inference.

    shard s:  rows [a_s, b_s) of W_enc, b_enc and W_dec; b_dec and W_skip are small, and stay whole
    encode:   each shard selects among its own latents, then the best of all candidates are taken
    decode:   y = Σ_s (what shard s writes) + b_dec

Only candidates travel, k per token and shard, never scores [tokens, num_latents]. The selection is
exact: the k largest of the dictionary are among the k largest of each shard, and the order is that
of a whole SAE (the larger first, among equals the lower latent).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saert.kernels.decode import sparse_decode
from saert.kernels.encode import Encoded
from saert.sae import SAE
from saert.shard_rows import bounds_of, identity, owned, part, placed
from saert.sparse import SparseCode
from saert.together import OneProcess, Processes

_PARTS = ("W_enc", "W_dec", "b_enc")  # nobody has them whole


def shard(
    sae: SAE,
    devices: Sequence[torch.device | str] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> ShardedSAE:
    """Spread an SAE's latents over devices of this process, or over the processes of a group.

    Args:
        sae: a whole SAE, typically loaded with device="cpu". Its rows are copied: it may go.
        devices: one per shard, as ["cuda:0", "cuda:1"]; shards stay where they are put.
        group: each of its processes calls this with the same SAE, keeps its own rows, and from then
            on passes the same hidden states as the others, as the processes of a tensor-parallel
            model do (tp_plan="auto"). The rows move to the model's device when it is attached.

    Latents are divided evenly, the first shards getting one more where that does not work out; for
    GroupMax, whole groups are.

    Raises:
        ValueError: neither or both of devices and group, more shards than latents, an SAE that is
            sharded already, an activation that cannot be (MatchingPursuit: each of its steps looks
            at the whole dictionary), or processes with different SAEs.

    >>> sharded = shard(sae, devices=["cpu", "cpu"])  # ["cuda:0", "cuda:1"] where there are
    >>> sharded.encode(torch.randn(2, 5, sae.d_in))
    SparseCode(2x5 tokens, k=16, num_latents=1024)
    """
    if (devices is None) == (group is None):
        hint = " (dist.group.WORLD is None before init_process_group)" if group is None else ""
        raise ValueError(f"shard: expected either devices= or group={hint}")
    if not isinstance(sae, SAE):
        raise TypeError(f"shard: found {type(sae).__name__}, expected an SAE; load() makes one")
    if not sae.whole:
        raise ValueError("shard: the SAE is sharded already; shard the whole one")
    if devices is not None and not len(devices):
        raise ValueError("shard: no devices given")
    together = OneProcess() if group is None else Processes(group)
    together.check_same(identity(sae))
    bounds = bounds_of(sae, together.world if devices is None else len(devices))
    return ShardedSAE(sae, bounds, devices, together)


class ShardedSAE(SAE):
    """An SAE in shards. Made by `shard`; encodes, decodes and attaches as the whole one does.

    Codes have the same latents as the whole SAE's and the same activations up to rounding: a matrix
    product of fewer rows may add in another order. A reconstruction is a sum of one part per shard.

    `device` is where hidden states come in and results go out; `.to(device)` changes that, and
    leaves shards where they are that were given a device. What needs the whole of `W_enc` or
    `W_dec` (training, saving, refinement, compiled=True, decoder neighbours) raises ValueError.
    Gradients pass to hidden states and amounts over the devices of one process, not between
    processes.
    """

    whole = False

    def __init__(
        self,
        sae: SAE,
        bounds: Sequence[int],
        devices: Sequence[torch.device | str] | None,
        together: OneProcess,
    ) -> None:
        nn.Module.__init__(self)
        self._bounds, self._together = tuple(bounds), together
        self._stays = devices is not None
        mine = range(len(bounds) - 1) if devices is not None else [together.rank]
        places = [sae.device] if devices is None else list(map(_indexed, devices))
        self._starts = [bounds[i] for i in mine]
        self.shards = nn.ModuleList(
            part(sae, slice(bounds[i], bounds[i + 1]), place)
            for i, place in zip(mine, places, strict=True)
        )
        self._home = places[0]
        self.b_dec, self.W_skip = (placed(t, self._home) for t in (sae.b_dec, sae.W_skip))
        self.activation = copy.deepcopy(sae.activation).requires_grad_(False).to(self._home)
        self.hookpoint, self.target_hookpoint = sae.hookpoint, sae.target_hookpoint
        self.input_transform, self.subtract_b_dec = sae.input_transform, sae.subtract_b_dec
        self.select_by_decoder_norm = sae.select_by_decoder_norm
        self.metadata = dict(sae.metadata)
        self.training = False

    # -- sizes and places ----------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        return self._first.d_in

    @property
    def d_out(self) -> int:
        return self._first.d_out

    @property
    def num_latents(self) -> int:
        return self._bounds[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._home

    @property
    def decoder_version(self) -> tuple[int, int]:
        return 0, 0  # the rows are copies, which nothing trains

    @property
    def _first(self) -> SAE:
        return next(self._parts())[1]

    def _parts(self) -> Iterator[tuple[int, SAE]]:
        """The shards of this process, each with its first latent."""
        return zip(self._starts, cast("list[SAE]", list(self.shards)), strict=True)

    # -- reading -------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> SparseCode:
        self._begin("encode", x)
        return super().encode(x)

    def _encoded(self, x: Tensor) -> Encoded:
        found = [self._candidates(x, start, one) for start, one in self._parts()]
        k = getattr(self.activation, "k", None)
        width = self._together.widest([one[1] for one in found]) if k is None else int(k)
        columns = [
            torch.cat(self._joined(column, width), -1) for column in zip(*found, strict=True)
        ]
        indices, values = columns[:2]
        order = columns[-1].detach().abs().sort(dim=-1, descending=True, stable=True).indices
        if k is None:  # as wide as the widest token
            active = (values != 0).sum(-1)
            k = max(1, int(active.max())) if active.numel() else 1
        indices, values = (column.gather(-1, order[..., :k]) for column in (indices, values))
        return Encoded(indices, values, values.isnan().any(-1))

    def _candidates(self, x: Tensor, start: int, one: SAE) -> tuple[Tensor, ...]:
        """A shard's selection [*tokens, ≤ k]: latents, values, and the ranks if others than those.

        A token with a NaN among its scores has it among its values, for everyone to see.
        """
        found = one._encoded(x.to(one.device))
        values = found.values.masked_fill(found.nan.unsqueeze(-1), torch.nan)
        indices = (found.indices + start).where(values != 0, 0)
        weight = one._selection_weight()
        if weight is None or self.activation.per_latent:
            return indices, values
        return indices, values, values.detach() * weight[found.indices]

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        if latents is None:
            return self._of_all(x, SAE.pre_activations)
        return self._of_some(x, latents, SAE.pre_activations)

    def activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        if not self.activation.per_latent:
            code = self.encode(x)
            return code.to_dense() if latents is None else code.at(latents)
        if latents is None:
            return self._of_all(x, SAE.activations)
        return self._of_some(x, latents, SAE.activations)

    def _of_all(self, x: Tensor, ask: Callable[..., Tensor]) -> Tensor:
        """What every shard says of all its latents, [*tokens, num_latents]."""
        self._begin("all latents", x)
        self._check_width(x)
        parts = [ask(one, x.to(one.device)) for _, one in self._parts()]
        sizes = [end - begin for begin, end in pairwise(self._bounds)]
        joined = self._joined(parts, max(sizes))
        return torch.cat([p[..., :n] for p, n in zip(joined, sizes, strict=True)], -1)

    def _of_some(self, x: Tensor, latents: Tensor, ask: Callable[..., Tensor]) -> Tensor:
        """What the owners say of these latents, [*tokens, E]; a sum in which the others are 0."""
        self._begin("some latents", x, latents)
        self._check_width(x)
        self._check_latents(latents)
        parts = []
        for start, one in self._parts():
            own, local = owned(latents.to(one.device), start, one)
            parts.append(ask(one, x.to(one.device), local).where(own, 0))
        return self._added(parts)

    # -- writing -------------------------------------------------------------------------------

    def directions(self, latents: Tensor) -> Tensor:
        self._begin("directions", latents)
        self._check_latents(latents)
        parts = []
        for start, one in self._parts():
            own, local = owned(latents.to(one.device), start, one)
            rows = one.W_dec[local].where(own.unsqueeze(-1), 0)
            parts.append(rows.to(torch.promote_types(self.dtype, torch.float32)))
        return self._added(parts).to(self.dtype)

    def written(self, latents: Tensor, values: Tensor, base: Tensor | None = None) -> Tensor:
        if latents.dim() == 1:  # the same rows for all tokens: bring those, not what they write
            rows, own_order = self.directions(latents), torch.arange(len(latents))
            return sparse_decode(own_order.to(rows.device), values, rows, base=base)
        self._begin("written", latents, values)
        self._check_latents(latents)
        parts = []
        for start, one in self._parts():
            own, local = owned(latents.to(one.device), start, one)
            parts.append(sparse_decode(local, values.to(one.device).where(own, 0), one.W_dec))
        total = self._added(parts)
        return total if base is None else base + total

    def decode(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        y = self.written(code.indices, code.values)
        y = y if self.b_dec is None else y + self.b_dec.to(y.dtype)
        return self._restore(y, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    # -- together ------------------------------------------------------------------------------

    def _begin(self, what: str, *tensors: Tensor) -> None:
        """First of all: what raised in one process before this would leave the others waiting."""
        if torch.compiler.is_compiling():  # torch.compile leaves a frame that raises to Python
            raise NotImplementedError(
                f"SAE{self._where()} is sharded, and cannot be part of a graph without breaks"
            )
        self._together.agree(self._home, what, *tensors)

    def _joined(self, parts: Sequence[Tensor], width: int) -> list[Tensor]:
        """The parts of all shards, each [*tokens, width], zeros filling up, on this device."""
        pad = nn.functional.pad
        return self._together.joined(
            [pad(part, (0, width - part.shape[-1])).to(self._home) for part in parts]
        )

    def _added(self, parts: list[Tensor]) -> Tensor:
        return self._together.added([part.to(self._home) for part in parts])

    def _check_width(self, x: Tensor) -> None:
        super()._check_width(x)
        if x.device != self._home:
            raise ValueError(
                f"SAE{self._where()}: the input is on {x.device}, but this sharded SAE takes it on "
                f"{self._home}; call sae.to({str(x.device)!r}), as attach does"
            )

    def _check_latents(self, latents: Tensor) -> None:
        """A latent that nobody has would read as 0."""
        if not latents.numel():
            return
        low, high = (int(end) for end in latents.aminmax())
        if low < 0 or high >= self.num_latents:
            raise IndexError(f"latents {low} to {high}, expected 0 to {self.num_latents - 1}")

    # -- what a sharded SAE is not -------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> ShardedSAE:
        """Take hidden states on another device. In a group, this process's rows move there too.

        Raises ValueError for another dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            raise ValueError(
                f"a sharded SAE keeps its dtype, {self.dtype}, and cannot become {dtype}: shard "
                f"one that was loaded with dtype={dtype}"
            )
        if device is not None and (home := _indexed(device)) != self._home:
            if not self._stays:
                for _, one in self._parts():
                    one.to(home)
            self.activation.to(home)
            self.b_dec, self.W_skip = (placed(t, home) for t in (self.b_dec, self.W_skip))
            self._home = home
        return self

    def train(self, mode: bool = True) -> ShardedSAE:
        """Raises ValueError for mode=True: only a whole SAE can be trained."""
        if mode:
            self._refuse("training")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ShardedSAE:
        if requires_grad:
            self._refuse("training")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("a state dict")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("a state dict")

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        self._refuse("cuda(), half() and their kin, other than to(device),")

    def __getattr__(self, name: str) -> Any:
        if name in _PARTS:
            self._refuse(name)
        return super().__getattr__(name)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"SAE{self._where()} is sharded, and {what} needs all of its latents in one place: use "
            "the whole SAE, before shard() (on the CPU, if it fits no GPU)"
        )

    def extra_repr(self) -> str:
        local = ", ".join(
            f"{start}…{start + one.num_latents - 1} on {one.device}" for start, one in self._parts()
        )
        who = "" if self._stays else f"process {self._together.rank} of {self._together.world}: "
        return f"{super().extra_repr()}, {who}latents {local}"


def _indexed(device: torch.device | str) -> torch.device:
    """ "cuda" -> "cuda:0", say, which is what tensors call it."""
    return torch.empty(0, device=device).device
