"""Each floor may import itself and the floors below it. Anything else is a design change."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "core", "hub", "measure", "train", "engines", "demos", "cli"]  # ground first
FOLDERS = {f: f for f in FLOORS if f not in ("core", "cli")} | {"bundled": "hub"}
LINKS = ("kernels", "hub", "train", "demos")  # folders that the package reaches by symlink
SKIPS = {("demos", "train")}  # below, and yet none of its business
ROOF = "saert"  # saert/__init__.py may see the whole library; nobody inside sees it
THIRD_PARTY = {"kernels": {"torch", "triton"}}  # the ground floor stands on these alone


def floor_of(module: str) -> str:
    """The floor of a dotted module name below `saert`."""
    part = module.split(".")[1]
    if part == "cli" or part.startswith("_cli"):
        return "cli"
    return FOLDERS.get(part, "core")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by dotted name; the symlinked folders count once."""
    found = {}
    for path in sorted((root / "saert").rglob("*.py")):
        found[".".join(path.relative_to(root).with_suffix("").parts)] = path
    for folder in LINKS:  # rglob does not enter symlinks
        for path in sorted((root / folder).rglob("*.py")):
            name = "saert." + ".".join(path.relative_to(root).with_suffix("").parts)
            found[name] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, int]]:
    """`(module, line)` of every absolute import, function bodies included.

    `from saert.x import y` is `saert.x.y` if that is a module and `saert.x` otherwise. A relative
    import keeps its dots.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            for alias in node.names:
                deeper = f"{source}.{alias.name}"
                yield (deeper if deeper in known and source != ROOF else source), node.lineno


def at_import_time(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported."""
    kept: list[ast.stmt] = []
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept.append(node)
        queue += ast.iter_child_nodes(node)
    return ast.Module(body=kept, type_ignores=[])


def violations(root: Path) -> list[str]:
    """Every import that does not point down, as `file:line: what`."""
    package = modules(root)
    found = []

    def complain(path: Path, line: int, what: str) -> None:
        found.append(f"{path.relative_to(root)}:{line}: {what}")

    for name, path in package.items():
        for target, line in imports(ast.parse(path.read_text()), set(package)):
            head = target.split(".")[0]
            if target.startswith("."):
                complain(path, line, f"relative import of {target}; write saert.…")
            elif name == ROOF:
                continue
            elif target == ROOF:
                complain(path, line, "imports from the roof; name the module, saert.…")
            elif head == ROOF:
                here, there = floor_of(name), floor_of(target)
                if FLOORS.index(there) > FLOORS.index(here):
                    complain(path, line, f"{here} imports {target}, which is {there}, above it")
                elif (here, there) in SKIPS:
                    complain(path, line, f"{here} imports {target}; {there} is not for {here}")
            elif head in (*LINKS, "tests", "benchmarks"):
                complain(path, line, f"imports bare {head}; write saert.…")
            elif (
                allowed := THIRD_PARTY.get(floor_of(name))
            ) and head not in allowed | sys.stdlib_module_names:
                complain(path, line, f"{floor_of(name)} imports {head}")
    return found


def cycle(root: Path) -> list[str]:
    """A ring of modules that import each other at import time, or []."""
    package = modules(root)
    graph = {
        name: {
            target
            for target, _ in imports(at_import_time(ast.parse(path.read_text())), set(package))
            if target in package and target != name
        }
        for name, path in package.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if ring := visit(target, [*trail, name]):
                return ring
        done.add(name)
        return []

    return next((ring for name in sorted(graph) if (ring := visit(name, []))), [])


def test_imports_point_down():
    assert violations(ROOT) == []


def test_no_circular_imports():
    assert cycle(ROOT) == []


def test_the_checker_sees_the_house():
    seen = modules(ROOT)
    assert "saert.kernels.decode" in seen and "saert.sparse" in seen
    assert {floor_of(name) for name in seen if name != ROOF} >= {"kernels", "core"}


def test_mandated_folders_are_not_packages():
    # `kernels/__init__.py` would shadow Hugging Face's `kernels` in every checkout.
    assert not [f for f in LINKS if (ROOT / f / "__init__.py").exists()]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("kernels/a.py", "import saert.sparse", "kernels imports saert.sparse"),
        ("kernels/a.py", "import numpy", "kernels imports numpy"),
        ("saert/sae.py", "def f():\n    from saert.hub.load import load", "core imports saert.hub"),
        ("saert/sae.py", "from saert.bundled import x", "core imports saert.bundled"),
        ("saert/sae.py", "from saert import cli", "roof"),
        ("saert/cli.py", "from saert import attach", "roof"),
        ("saert/cli.py", "import saert", "roof"),
        ("saert/sae.py", "from .sparse import SparseCode", "relative import"),
        ("saert/sae.py", "from . import sparse", "relative import"),
        ("hub/load.py", "import saert.measure.probes", "hub imports saert.measure"),
        ("saert/measure/probes.py", "from saert.train import loop", "measure imports saert.train"),
        ("train/loop.py", "from saert.engines import vllm", "train imports saert.engines"),
        ("saert/engines/vllm.py", "import saert._cli_demo", "engines imports saert._cli_demo"),
        ("train/loop.py", "from hub.load import load", "bare hub"),
        ("saert/engines/server.py", "import demos.app", "bare demos"),
        ("saert/engines/server.py", "import saert.demos.app", "engines imports saert.demos.app"),
        ("demos/app.py", "from saert._cli_io import x", "demos imports saert._cli_io"),
        ("demos/app.py", "from saert.train import text", "train is not for demos"),
    ],
)
def test_planted_violations_are_caught(tmp_path, file, text, complaint):
    plant(tmp_path, {file: text})
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:") and complaint in found


def test_planted_lawful_imports_pass(tmp_path):
    plant(
        tmp_path,
        {
            "saert/__init__.py": "from saert.cli import app\nfrom saert.hub.load import load",
            "kernels/encode.py": "import math, torch, triton\nfrom saert.kernels import decode",
            "kernels/decode.py": "import torch",
            "saert/sae.py": "import numpy\nfrom saert.kernels.encode import encode",
            "hub/load.py": "from saert.sae import SAE\nfrom saert.bundled import model",
            "saert/cli.py": "from saert.hub import load\nfrom saert.engines import server",
            "saert/engines/server.py": "import fastapi",
            "demos/app.py": "import gradio\nfrom saert.measure import ablation",
            "saert/_cli_app.py": "def f():\n    from saert.demos.app import launch",
        },
    )
    assert violations(tmp_path) == []
    assert cycle(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "ring"),
    [
        ("from saert.b import f", True),
        ("class A:\n    from saert.b import f", True),
        ("try:\n    from saert import b\n    import saert.b\nexcept ImportError:\n    pass", True),
        ("def late():\n    from saert.b import f", False),
        ("if TYPE_CHECKING:\n    from saert.b import f", False),
    ],
)
def test_planted_cycles_are_caught(tmp_path, text, ring):
    plant(tmp_path, {"saert/a.py": text, "saert/b.py": "from saert.a import g"})
    assert bool(cycle(tmp_path)) is ring
