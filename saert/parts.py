"""Tensor parallelism: hidden states of which each process holds a part.

Between blocks, and where attention and MLP begin and end, every process holds the whole hidden
state. Inside them each holds its own heads or neurons (`attn_z`, `mlp_act`, the linear layers). A
hook there is given the parts of all processes, put together in the order of the weights they meet;
what it returns is taken apart again. So every process encodes, edits and records the same, and an
SAE never reads a part of a vector: where nothing says how the parts belong together, the hookpoint
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saert.architecture import HookpointError, Location, blocks, features, join, unwrap

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Act = Callable[[Tensor], Tensor | None]


def gathered(model: nn.Module, at: Location, act: Act) -> Act:
    """`act`, to be hooked at `at`: it is given the whole hidden state in every process.

    At `attn_z`, `mlp_act` and other split linear layers the processes then wait for each other, so
    all of them have to hook there. In one process, and where nothing is split, `act` itself.

    Raises HookpointError for a tensor inside attention or MLP that is neither input nor output of
    a linear layer, and for models that split the sequence.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return act
    from torch.distributed.tensor import DTensor

    _check_plan(model, at)
    split = _split(at)

    def whole(hidden: Tensor) -> Tensor | None:
        if isinstance(hidden, DTensor):
            new = act(_replicated(hidden, at))
            return None if new is None else _distributed(new, hidden.device_mesh, hidden.placements)
        if split is None or hidden.shape[-1] == split.width:
            return act(hidden)
        shape = torch.Size((*hidden.shape[:-1], split.width))
        stride = torch.empty(shape, device="meta").stride()
        part = DTensor.from_local(
            hidden, split.mesh, split.placements, run_check=False, shape=shape, stride=stride
        )
        new = act(part.full_tensor())
        if new is None:
            return None
        return _distributed(new, split.mesh, split.placements).to_local()

    return whole


@dataclass(frozen=True)
class _Split:
    """How the last dimension of a tensor, `width` long when whole, is split."""

    width: int
    mesh: Any
    placements: tuple[Any, ...]


def _split(at: Location) -> _Split | None:
    """What the weight of a linear layer says about its input or output; None: it is not split.

    A weight [out, in] that is split along `in` meets the same parts of the input, and one split
    along `out` makes such parts of the output. Some plans gather before or split behind the hook:
    then the tensor is as wide as the layer says, which the hook sees.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weight: Any = getattr(at.module, "weight", None)
    width = features(at.module, at.side)
    along = 1 if at.side == "in" else 0
    if not isinstance(weight, DTensor) or weight.ndim != 2 or weight.shape[along] != width:
        return None
    placements: list[Any] = []
    for placement in weight.placements:
        if type(placement) is Shard:
            placements.append(Shard(-1) if placement.dim % 2 == along else Replicate())
        elif placement.is_replicate():
            placements.append(placement)
        else:
            raise HookpointError(
                f"{at.path}: each process holds a part of this tensor, and its weight is split as "
                f"{placement}, which saert cannot put together; choose a hookpoint before or after "
                "the attention or MLP that it is in"
            )
    if all(placement.is_replicate() for placement in placements):
        return None
    return _Split(width, weight.device_mesh, tuple(placements))


def _replicated(hidden: Any, at: Location) -> Tensor:
    """All of a DTensor, in every process."""
    if any(placement.is_partial() for placement in hidden.placements):
        raise HookpointError(
            f"{at.path}: each process holds a summand of this tensor, and a bias may be missing; "
            "choose the output of the attention or MLP that the layer is in"
        )
    whole: Tensor = hidden.full_tensor()
    return whole


def _distributed(whole: Tensor, mesh: Any, placements: Any) -> DTensor:
    """A tensor that every process holds, as a DTensor split by `placements`."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * mesh.ndim
    return DTensor.from_local(whole, mesh, everywhere, run_check=False).redistribute(
        placements=placements
    )


def _check_plan(model: nn.Module, at: Location) -> None:
    """Refuse what each process may hold a part of, with nothing to say which."""
    plan: Any = getattr(unwrap(model)[1], "tp_plan", None) or {}
    linear = hasattr(at.module, "in_features") or hasattr(at.module, "nx")
    if "sequence_parallel" in plan.values() and _tensor_parallel(model):
        raise HookpointError(
            f"{at.path}: the model's tp_plan splits the sequence between processes "
            "(sequence_parallel), so none sees all tokens; load it with a plan without that"
        )
    if not linear and _inside(model, at) and _tensor_parallel(model):
        raise HookpointError(
            f"{at.path}: tensor parallelism splits what is inside attention and MLP, and nothing "
            "says which part of this tensor a process holds; choose attn_z, mlp_act, a linear "
            "layer, or a hookpoint before or after"
        )


def _tensor_parallel(model: nn.Module) -> bool:
    """Whether a linear layer's weight is split along its input, as FSDP splits none."""
    from torch.distributed.tensor import DTensor, Shard

    return any(
        isinstance(p, DTensor) and p.ndim >= 2
        and any(isinstance(s, Shard) and s.dim % p.ndim == p.ndim - 1 for s in p.placements)
        for p in model.parameters()
    )  # fmt: skip


def _inside(model: nn.Module, at: Location) -> bool:
    """Whether a module is part of a block's attention or MLP, not the whole of either."""
    try:
        path, layers = blocks(model)
    except HookpointError:
        return False
    layer, _, rest = at.path.removeprefix(path + ".").partition(".")
    if not at.path.startswith(path + ".") or not layer.isdigit():
        return False
    inner, _ = unwrap(layers[int(layer)])
    return "." in at.path.removeprefix(join(path, layer, inner)).removeprefix(".")
