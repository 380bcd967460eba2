"""Make Triton's interpreter fast for sorts and right for bfloat16: test-only, by importing this.

Four things in it stand in the way. An xor or or reduction runs as a Python loop over elements, and
`tl.sort` and `tl.topk` do one at every step of their network; such a step takes 25 operations even
so. Every call of a jitted function from a kernel looks through all of triton.language for
something left to patch. And `tl.dot` multiplies the raw bits of bfloat16. The repairs replace
internals, so a small kernel is run with them, and if it does not give what it should they are
taken back: tests are then very slow, and those of bfloat16 products may fail. Without
TRITON_INTERPRET, as on a GPU, importing this does nothing.
"""

import os

REPAIRED = False

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    @triton.jit
    def _trial(a, b, product, keys, best):
        at = tl.arange(0, 16)
        square = at[:, None] * 16 + at[None, :]
        tl.store(product + square, tl.dot(tl.load(a + square), tl.load(b + square)))
        some = tl.load(keys + at)
        top = tl.maximum(tl.bitonic_merge(tl.topk(some, 4)), tl.topk(some + 8, 4))
        tl.store(best + tl.arange(0, 4), tl.bitonic_merge(top, descending=True))


def _repairs():
    """(owner, attribute, replacement) of everything that is replaced."""
    reductions = {"_xor_combine": np.bitwise_xor, "_or_combine": np.bitwise_or}
    slow, raw, patch = (
        interpreter.ReduceOps.apply_impl,
        interpreter.InterpreterBuilder.create_dot,
        interpreter._patch_lang,
    )

    def apply_impl(self, input):
        combine = getattr(self.combine_fn, "fn", self.combine_fn)
        ufunc = reductions.get(getattr(combine, "__name__", ""))
        if ufunc is None or self.axis is None:
            return slow(self, input)
        data = ufunc.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, input[0].dtype)

    def compare_and_swap(x, flip, i):
        """x is a cube [2, ..., 2]: order both ends of each edge along the i-th axis from last."""
        data, axis = x.handle.data, x.handle.data.ndim - 1 - int(i)
        partner = np.flip(data, axis)
        right = np.arange(2).reshape([2 if a == axis else 1 for a in range(data.ndim)])
        flip = flip.handle.data if hasattr(flip, "handle") else int(getattr(flip, "value", flip))
        ordered = np.where((data > partner) != ((flip ^ right) != 0), partner, data)
        return tl.core.tensor(interpreter.TensorHandle(ordered, x.dtype), x.type)

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16  # a bfloat16 is the upper half of a float32
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return raw(self, widened(a), widened(b), d, *rest)

    def _patch_lang(fn):
        languages = [value for value in fn.__globals__.values() if value in (tl, tl.core)]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()  # called from a kernel: all is patched already
        return patch(fn)

    return (
        (interpreter.ReduceOps, "apply_impl", apply_impl),
        (interpreter.InterpreterBuilder, "create_dot", create_dot),
        (interpreter, "_patch_lang", _patch_lang),
        (tl.standard, "_compare_and_swap", compare_and_swap),
    )


def _works() -> bool:
    twos = torch.full((16, 16), 2.0, dtype=torch.bfloat16)
    product, best = torch.zeros(16, 16), torch.zeros(4, dtype=torch.int64)
    keys = torch.arange(16) * 7 % 16
    for _ in range(2):  # the second launch finds what the first one left patched
        _trial[(1,)](twos, twos, product, keys, best)
    return bool((product == 64).all()) and best.tolist() == [23, 22, 21, 20]


def _repair() -> bool:
    before = []
    try:
        for owner, name, replacement in _repairs():
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
        if _works():
            return True
    except Exception:  # whatever changed in there, the interpreter as it comes still works
        pass
    for owner, name, original in before:
        setattr(owner, name, original)
    return False


if os.environ.get("TRITON_INTERPRET") == "1":
    REPAIRED = _repair()
