"""Compiling a Triton kernel for an H200 without one: what the interpreter says nothing about."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import triton

COMPILE = """
import json, sys
from importlib import import_module
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
for module, kernel, signature, constants, options in json.load(sys.stdin):
    function = getattr(import_module("saert.kernels.gpu." + module), kernel)
    place = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        signature={name: signature.get(name, "constexpr") for name in place},
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[n]: [["tt.divisibility", 16]] for n, t in signature.items() if t[0] == "*"},
    )
    done = compile(source, GPUTarget("cuda", 90, 32), options)
    print(kernel, len(done.asm["cubin"]))
"""


def assert_all_compile(cases: Iterable[list[Any]], cache: Path) -> None:
    """Each case is [module of kernels/gpu, kernel, {argument: type}, constants, options].

    In a process of its own, since the interpreter is on in this one.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip(f"triton {triton.__version__} compiles ahead of time through other calls")
    cases = list(cases)
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], input=json.dumps(cases), text=True, capture_output=True,
        env=plain | {"TRITON_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(cases) > 0
