"""Every Python block of the README and the docs runs as printed, and so do the docstrings."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import saert
from saert.hub import bundled

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES
}
MODULES = ("activations", "edits", "hookpoint", "refine", "runtime", "sae", "sparse", "transforms")
MODULES += ("sharded", "hub.load", "hub.format", "hub.verify")
MODULES += ("hub.publish", "hub.publishing.private")
MODULES += ("measure.reports.compute", "measure.reports.reconstruction")
MODULES += ("measure.attribution.attribute", "measure.attribution.metric")
MODULES += ("measure.attribution.agreement", "measure.ablation.ablate", "measure.n2g.graph")
MODULES += ("measure.steering.setup", "measure.steering.spec", "twin")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.name
)
def test_the_examples_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_docstring_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = bundled.model(), bundled.tokenizer()
    names = {key: getattr(saert, key) for key in saert.__all__} | {"torch": torch, "model": model}
    names["inputs"] = tokenizer("Once upon a time", return_tensors="pt")
    names["sae"] = bundled.sae("resid_post.2")
    found = doctest.testmod(
        importlib.import_module(f"saert.{name}"), extraglobs=names, optionflags=doctest.ELLIPSIS
    )
    assert found.failed == 0


def test_the_pages_link_to_files_that_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
