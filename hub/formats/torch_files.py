"""What the families kept in `.pt` files share: their names, and two ways to lay out a matrix.

`nn.Linear` keeps [out, in]; a bare parameter lies as `x @ W` needs it, [in, out]. The lengths of
the biases tell the two apart, except for a square matrix: there only the format knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from saert.hub.checkpoint import Checkpoint

# A lone file of weights: neither one that another layout names, nor the state of a training run.
SINGLE_FILE = r"(?!s?ae\.pth?$)(?!.*(?:optim|sched|state|loss|sparsity|args|rng_))[^/]+\.pth?"


def expect_entries(
    c: Checkpoint, needed: Iterable[str], optional: Iterable[str] = (), beside: Iterable[str] = ()
) -> None:
    """`expect_tensors`, and of what is no tensor nothing but `beside`."""
    c.expect_tensors(needed, optional)
    if unknown := sorted(set(c.tensors.extras) - set(beside)):
        raise c.error(f"found {unknown} beside the tensors; ignoring them could change the numbers")


Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""W_enc, W_dec, b_enc, b_dec as `SAE.from_weights` takes them."""


def read_weights(c: Checkpoint, names: Mapping[str, str], *, linear: bool) -> Weights:
    """W_enc, W_dec, b_enc, b_dec as `SAE.from_weights` takes them.

    Args:
        names: what the file calls "W_enc", "W_dec" and those of "b_enc", "b_dec" that it has.
        linear: W_enc is [num_latents, d_in] and W_dec [d_in, num_latents], as `nn.Linear` keeps
            them; otherwise both are the other way round.

    Raises FormatError for shapes that contradict each other.
    """
    expect_weights(c, names, linear=linear)
    turned = "W_dec" if linear else "W_enc"
    found = {
        ours: c.tensors.get(theirs, transpose=ours == turned) for ours, theirs in names.items()
    }
    return found["W_enc"], found["W_dec"], found.get("b_enc"), found.get("b_dec")


def expect_weights(c: Checkpoint, names: Mapping[str, str], *, linear: bool) -> tuple[int, int]:
    """num_latents and d of weights as `read_weights` takes them; refuse contradicting shapes."""
    shape = c.matrix(names["W_enc"])
    num_latents, d = shape if linear else shape[::-1]
    c.expect_shape(names["W_dec"], *shape[::-1])
    for bias, size in (("b_enc", num_latents), ("b_dec", d)):
        if bias in names:
            c.expect_shape(names[bias], size)
    return num_latents, d


def read_scalar(c: Checkpoint, name: str) -> Any:
    """A number, kept as a tensor or beside the tensors; None where there is none."""
    if name not in c.tensors.names:
        return c.tensors.extras.get(name)
    c.expect_shape(name)
    return c.tensors.get(name, exact=True).item()


def expect_count(c: Checkpoint, name: str, *found: Any) -> int:
    """The one count that several places give; None is a place that does not."""
    given = {one for one in found if one is not None}
    if len(given) != 1:
        raise c.error(f"{name} is {sorted(map(str, given)) or 'nowhere'}, expected one number")
    (value,) = given
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1:
        raise c.error(f"{name} is {value!r}, expected an integer of at least 1")
    return int(value)


def known(**facts: Any) -> dict[str, Any]:
    """Metadata without what is unknown."""
    return {key: value for key, value in facts.items() if value is not None}
