"""What a pickle of tensors says, without running it.

A pickle is a program for a small stack machine, and one of its instructions is "call this". Here
only the instructions that build plain containers are known, and "call" understands a handful of
names, the ones `torch.save` writes for tensors; nothing is imported, and nothing is called. It is
`torch.load(weights_only=True)` without the reading of tensors, which can wait.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saert.hub.errors import FormatError

MOST_BYTES = 1 << 20  # of a pickle: it names tensors, their bytes lie elsewhere
MOST_ELEMENTS, MOST_DIMENSIONS = 1 << 48, 8
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    # bytes whose dtype each tensor names
    "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """Where a tensor's numbers lie: a record of the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Strided:
    """A tensor as its pickle describes it, in elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Program:
    """What a pickle builds, the storages it names, and where the next one starts."""

    value: Any
    storages: dict[str, Storage]
    end: int


_MARK = object()
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "MARK": lambda: _MARK,
}  # fmt: skip


def interpret(program: bytes) -> Program:
    """What a pickle at the start of some bytes says.

    Raises FormatError naming an instruction or a call that tensors do not need: such a file is not
    a state dict, or is hostile. Malformed bytes raise whatever they raise; see `errors.reading`.
    Values may name one another many times, so none is copied, hashed or printed here.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    argument: Any
    for code, argument, position in pickletools.genops(program[:MOST_BYTES]):
        name = code.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _MAKERS:
            stack.append(_MAKERS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name == "LIST":
            stack.append(_since_mark(stack))
        elif name == "DICT":
            stack.append(_pairs(_since_mark(stack)))
        elif name == "APPEND":
            _extend(stack, [stack.pop()])
        elif name == "APPENDS":
            _extend(stack, _since_mark(stack))
        elif name == "SETITEM":
            _update(stack, [stack.pop(-2), stack.pop()])
        elif name == "SETITEMS":
            _update(stack, _since_mark(stack))
        elif name == "GLOBAL":
            stack.append(Name(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise FormatError("a pickle that names something by no text")
            stack.append(Name(module, attribute))
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            stack.append(storages.setdefault(storage.key, storage))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of a state dict: its version
        elif name == "STOP":
            if len(stack) != 1:
                raise FormatError(f"a pickle that leaves {len(stack)} values, expected one")
            return Program(stack[0], storages, int(position or 0) + 1)
        elif name not in ("PROTO", "FRAME"):
            raise FormatError(f"a pickle with {name}: expected tensors and plain values, no code")
    raise FormatError(f"a pickle without an end, expected one of at most {MOST_BYTES} bytes")


def _since_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _extend(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise FormatError("a pickle that appends to something that is no list")
    stack[-1] += items


def _update(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], dict):
        raise FormatError("a pickle that sets items of something that is no dict")
    stack[-1] |= _pairs(items)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    if not all(isinstance(key, str | int | float | None) for key in keys):
        raise FormatError("a dict whose keys are not text or numbers")
    return dict(zip(keys, values, strict=True))


def _storage(found: Any) -> Storage:
    """torch's persistent id: ("storage", class, key, device, number of elements[, a view])."""
    match found:
        case "storage", Name() as cls, str(key), _, int(numel), *view:
            dtype = STORAGES.get(cls.name) if cls.module in ("torch", "torch.storage") else None
            if dtype is None:
                raise FormatError(f"a storage of type {cls}, expected one of {', '.join(STORAGES)}")
            if not any(view) and 0 <= numel <= MOST_ELEMENTS:
                return Storage(key, dtype, numel)
    raise FormatError("a storage that is not described as torch.save does")


def _call(function: Any, arguments: Any) -> Any:
    """What one of torch's own helpers would have made."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise FormatError("a pickle that calls something that is no function")
    match str(function), arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch.Size", (tuple(sizes),):
            return sizes
        case "torch.device", (str(kind), *_):
            return kind
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (
            (Storage() as storage, *layout)
        ):
            return _strided(storage, layout, storage.dtype)
        case "torch._utils._rebuild_tensor_v3", (Storage() as storage, *layout):
            return _strided(storage, layout, _dtype(layout))
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (
            (Strided() as tensor, *_)
        ):
            return tensor
        case "torch._tensor._rebuild_from_type_v2", (Name() as inner, _, tuple(inner_arguments), _):
            return _call(inner, inner_arguments)
    raise FormatError(f"a pickle that calls {function}: expected tensors and plain values, no code")


def _strided(storage: Storage, layout: list[Any], dtype: torch.dtype) -> Strided:
    match layout:
        case [int(offset), tuple(shape), tuple(stride), *_]:
            sizes = (offset, *shape, *stride)
            plain = all(type(one) is int and 0 <= one <= MOST_ELEMENTS for one in sizes)
            if plain and len(shape) == len(stride) <= MOST_DIMENSIONS:
                return Strided(storage, offset, shape, stride, dtype)
    raise FormatError("a tensor that is not described as torch.save does")


def _dtype(layout: list[Any]) -> torch.dtype:
    """The seventh argument: float8 and other dtypes that have no storage class of their own."""
    match layout:
        case [_, _, _, _, _, Name() as name, *_]:
            found = {str(one): one for one in STORAGES.values()}.get(str(name))
            if found is not None:
                return found
            raise FormatError(f"a tensor of {name}, expected floats of 16 to 64 bits or integers")
    raise FormatError("a tensor that is not described as torch.save does")
