"""How what the shards of a dictionary computed comes together: in one process, or between several.

Every process calls the same collectives in the same order, whichever latents are asked for and
whoever has them. No gradient passes between processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ALIKE = 1e-3
"""How far mean |x| may be apart between processes, relatively: rounding stays far below."""

PLACES = 64
"""How many single entries of x are compared: Σ|x| alone is all but the same for any normed text."""

NEAR, FEW = 0.05, 3
"""At most FEW of those entries may differ by more than NEAR·(mean |x| + |entry|). Rounding between
processes, in bfloat16 too, is far below that; of another text's entries one in twenty is as near.
"""


class OneProcess:
    """All shards are here."""

    world, rank = 1, 0

    def widest(self, parts: Sequence[Tensor]) -> int:
        """The largest last dimension of all shards' parts."""
        return max(part.shape[-1] for part in parts)

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts of all shards in their order, where each process gives some of one shape."""
        return list(parts)

    def added(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of all shards' parts, here in the order of the shards."""
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def check_same(self, facts: object) -> None:
        """Raise ValueError, in all processes, if they hold different SAEs."""

    def agree(self, home: torch.device, what: str, *tensors: Tensor) -> None:
        """Raise ValueError, in all processes, if they do not ask for the same thing.

        What, shapes, dtypes and latents are compared exactly, and floats by their mean |x| and 64
        entries: text that differs in a few percent of its tokens only may pass. Nothing is raised
        before all have been asked; so call it before any check that one process alone might fail.
        """


class Processes(OneProcess):
    """Each process of a group has one shard; rank r the r-th."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("shard: this process is not in the group; call it in those that are")

    def widest(self, parts: Sequence[Tensor]) -> int:
        width = torch.tensor(super().widest(parts), device=parts[0].device)
        dist.all_reduce(width, dist.ReduceOp.MAX, self._group)
        return int(width)

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        (mine,) = parts
        _refuse_gradient(mine)
        found = [torch.empty_like(mine).contiguous() for _ in range(self.world)]
        dist.all_gather(found, mine.contiguous(), self._group)
        return found

    def added(self, parts: Sequence[Tensor]) -> Tensor:
        (mine,) = parts
        _refuse_gradient(mine)
        total = mine.contiguous()
        dist.all_reduce(total, dist.ReduceOp.SUM, self._group)
        return total

    def check_same(self, facts: object) -> None:
        found: list[object] = [None] * self.world
        dist.all_gather_object(found, facts, self._group)
        for rank, one in enumerate(found):
            if one != found[0]:
                raise ValueError(
                    f"shard: process {rank} has the SAE {one}, and process 0 {found[0]}; all must "
                    "shard the same one"
                )

    def agree(self, home: torch.device, what: str, *tensors: Tensor) -> None:
        asked = described(home, what, *tensors)
        table = torch.stack(self.joined([facts(home, asked, *tensors)])).cpu()
        if not same(table):
            raise ValueError(
                f"sharded SAE: the processes do not ask for the same (process {self.rank} of "
                f"{self.world}: {asked}). Each must pass the same hidden states, as processes of a "
                "tensor-parallel model do, with the same edits: give all of them the same batch"
            )


def described(home: torch.device, what: str, *tensors: Tensor) -> str:
    """What a process asks for, but for the numbers; also what will keep it from getting that."""
    asked = [what]
    for t in tensors:
        place = "" if t.device == home else f" on {t.device} instead of {home}"
        gradient = " with gradient" if t.requires_grad and torch.is_grad_enabled() else ""
        asked.append(f"{t.dtype} {list(t.shape)}{place}{gradient}")
    return " ".join(asked)


def facts(home: torch.device, asked: str, *tensors: Tensor) -> Tensor:
    """What processes compare, float64 [3 + PLACES]: checksum of `asked`, mean |x|, checksum of
    integers, entries of x. As long for every request, so that different ones can be compared."""
    found = torch.zeros(3 + PLACES, dtype=torch.float64, device=home)
    found[0] = zlib.crc32(asked.encode())
    for tensor in tensors:
        flat = tensor.detach().flatten()
        n, device = len(flat), flat.device
        if n and flat.is_floating_point():
            found[1] += (torch.linalg.vector_norm(flat, 1, dtype=torch.float64) / n).to(home)
            # one in each 64th of x, at an uneven distance: an even one may meet few of the columns
            i = torch.arange(PLACES, dtype=torch.float64, device=device)
            places = ((i + i * 0.6180339887498949 % 1) * (n / PLACES)).long()
            found[3:] += flat[places].to(home, torch.float64)
        elif n:
            powers = torch.full((n,), 0x5851F42D4C957F2D, device=device).cumprod(0)  # mod 2⁶⁴
            found[2] += (flat * powers).sum().to(home)
    return found


def same(table: Tensor) -> bool:
    """Whether all rows [processes, 3 + PLACES] tell of one request, up to rounding.

    All processes have the same table, so they all find the same. NaN or inf in all of them is no
    difference: what is wrong with that, encode says.
    """
    exact, mean = table[:, [0, 2]], table[:, 1]
    entries = table[:, 3:].nan_to_num(0.0, 0.0, 0.0)
    size = mean[0] if mean[0].isfinite() else entries[0].abs().mean()
    off = (entries - entries[0]).abs() > NEAR * (size + entries[0].abs())
    return bool(
        (exact == exact[0]).all()
        and torch.isclose(mean, mean[0], rtol=ALIKE, atol=0.0, equal_nan=True).all()
        and (off.sum(-1) <= FEW).all()
    )


def _refuse_gradient(part: Tensor) -> None:
    if part.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "sharded SAE: no gradient passes between processes; run this under torch.no_grad(), or "
            "shard over devices of one process"
        )
