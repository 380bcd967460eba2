"""What every test gets: the kernel interpreter, poisoned memory, a fixed seed, no network."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Before transformers, torch.use_deterministic_algorithms or any kernel is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
from browser import app_url, browser, new_page, page  # noqa: E402, F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty hands out NaN, so a kernel that leaves an element unwritten cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference checkpoints and texts beside the checkout. Without them: a visible skip."""
    folder = Path(os.environ.get("SAERT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; point SAERT_SHARED at the shared reference data")
    return folder


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
