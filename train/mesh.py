"""Where latents and tokens live: `shards` processes share the latents, `replicas` the tokens.

Rank = replica · shards + shard (openai/sparse_autoencoder). Shard s of S holds the rows
[s · n/S, (s + 1) · n/S) of W_enc, b_enc and W_dec; b_dec and W_skip are on every rank. A replica
sees its own tokens of each batch. With one process every operation here is the identity.

What the two sums must do to gradients (Megatron's f and g): a reconstruction is summed over shards
on the way forward, and each shard gets the whole gradient back; a tensor that all shards read is
passed on as it is, and its gradient is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("replicas", "shards")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@dataclass(frozen=True)
class Mesh:
    """This process's place among `replicas` × `shards`. `Mesh()` is one process alone."""

    shards: int = 1
    replicas: int = 1
    shard: int = 0
    replica: int = 0
    device_mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, shards: int = 1, device: str = "cpu") -> Mesh:
        """Lay the initialised process group out; one process if there is none.

        Raises ValueError if `shards` does not divide the number of processes.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if shards < 1 or world % shards:
            raise ValueError(
                f"{shards} shards do not divide {world} processes; choose a divisor, or start "
                f"torchrun --nproc-per-node {max(1, shards)}"
            )
        if world == 1:
            return cls()
        mesh = init_device_mesh(device, (world // shards, shards), mesh_dim_names=AXES)
        replica, shard = divmod(dist.get_rank(), shards)
        return cls(shards, world // shards, shard, replica, mesh)

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.shards * self.replicas

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes logs and results."""
        return self.shard == self.replica == 0

    # -- along the latents -----------------------------------------------------------------------

    def sum_latents(self, x: Tensor) -> Tensor:
        """The sum of x over the shards; each shard gets the gradient of the sum."""
        if self.shards == 1:
            return x
        found: Tensor = _Sum.apply(x, self._group("shards"))  # type: ignore[no-untyped-call]
        return found

    def shared(self, x: Tensor) -> Tensor:
        """x, which every shard holds and reads; its gradient is the sum over the shards."""
        if self.shards == 1:
            return x
        found: Tensor = _Shared.apply(x, self._group("shards"))  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def gather_latents(self, x: Tensor, dim: int = -1) -> Tensor:
        """Equal parts of all shards side by side, in the order of the latents. No gradient."""
        return x if self.shards == 1 else self._gather(x, dim, "shards")

    # -- along the tokens ------------------------------------------------------------------------

    @torch.no_grad()
    def sum_tokens(self, x: Tensor) -> Tensor:
        """The sum of x over the replicas. No gradient."""
        return x if self.replicas == 1 else self._reduce(x, dist.ReduceOp.SUM, "replicas")

    @torch.no_grad()
    def any_tokens(self, flags: Tensor) -> Tensor:
        """bool, whether any replica has the flag."""
        if self.replicas == 1:
            return flags
        return self._reduce(flags.to(torch.uint8), dist.ReduceOp.MAX, "replicas").bool()

    @torch.no_grad()
    def gather_tokens(self, x: Tensor) -> Tensor:
        """Equal parts of all replicas one after the other, in the order of the batch."""
        return x if self.replicas == 1 else self._gather(x, 0, "replicas")

    # -- all processes ---------------------------------------------------------------------------

    @torch.no_grad()
    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.least(-int(flag)) < 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @property
    def device(self) -> torch.device:
        """Where the collectives' tensors live."""
        kind = "cpu" if self.device_mesh is None else self.device_mesh.device_type
        return torch.device(kind if kind == "cpu" else f"{kind}:{torch.cuda.current_device()}")

    def _group(self, axis: str) -> dist.ProcessGroup:
        assert self.device_mesh is not None
        return self.device_mesh.get_group(axis)

    def _reduce(self, x: Tensor, op: Any, axis: str) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, op=op, group=self._group(axis))
        return x

    def _gather(self, x: Tensor, dim: int, axis: str) -> Tensor:
        x = x.contiguous()
        group = self._group(axis)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim)
