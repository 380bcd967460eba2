"""Files nobody wrote: whatever is done to a checkpoint, it is refused, or gives finite weights.

More than ten thousand cases, the same in every run; `SAERT_FUZZ=10` tries ten times as many others.
Every test runs in the memory that the process has and one gigabyte more, so a size that a file
only claims cannot be allocated.
"""

import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_cases import REFUSED, SEEDS, D, N, broken, content, cuts, edited, edits, normal, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saert.hub.detect import FAMILIES, find_saes
from saert.hub.errors import FormatError
from saert.hub.files.parse import read_config
from saert.hub.files.tensors import open_tensors
from saert.hub.format import read
from saert.sae import SAE

MORE = int(os.environ.get("SAERT_FUZZ", "1"))
CASES = {"json": 400, "yaml": 400, "names": 600}  # configs: three texts a case
CASES |= {"safetensors": 1500, "npz": 1200, "pt": 1200, "bin": 1000}
CASES |= {f"bytes of {name}": 80 for name in SEEDS} | {f"edits of {name}": 80 for name in SEEDS}
CASES |= {f"edits of {name}": 20 for name in REFUSED}
ALLOWED = (FormatError, FileNotFoundError)

pytestmark = pytest.mark.filterwarnings("ignore")  # what a family warns of is its tests' matter


def fuzzed(name: str, *strategies: st.SearchStrategy) -> Callable:
    """Run a function on as many generated cases as CASES says."""
    options = settings(
        max_examples=MORE * CASES[name], derandomize=MORE == 1, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda run: options(given(*strategies)(run))()


@pytest.fixture(autouse=True)
def bounded_memory():
    """An address space of one gigabyte more than is in use."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_at_least_ten_thousand_cases():
    assert sum(CASES.values()) + 2 * (CASES["json"] + CASES["yaml"]) >= 10_000


# -- one file ------------------------------------------------------------------------------------

CONFIGS = [
    value for _, files in SEEDS.values() for name, value in files.items()
    if name.endswith((".json", ".yaml"))
]  # fmt: skip
punctuation = st.text("{}[]:,-?&*!|>'\"#%@ \n\tab01<", max_size=40)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_configs(kind, tmp_path):
    path = tmp_path / f"config.{kind}"
    accepted = Counter()

    @fuzzed(kind, st.sampled_from(CONFIGS), cuts, punctuation)
    def run(config, changes, text):
        start = broken(content(path.name, config), changes)
        for case in (start, text.encode(), start[:40] + text.encode() + start[40:]):
            path.write_bytes(case)
            try:
                found = read_config(path)
            except FormatError as error:
                assert path.name in str(error)
            else:
                assert isinstance(found, dict) and all(isinstance(key, str) for key in found)
                accepted[True] += 1

    assert accepted[True] > CASES[kind] / 100


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt", "bin"])
def test_tensors(kind, tmp_path):
    """A file whose changed bytes are accepted gives tensors of the shapes that it promises."""
    path = tmp_path / f"w.{kind}"
    tensors = {"W": normal(N, D), "V": normal(D, N).T, "b": normal(N).half(), "k": torch.tensor(3)}
    plain = content(path.name, tensors)
    if kind == "bin":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
        plain = path.read_bytes()
    accepted = Counter()

    @fuzzed(kind, cuts, st.booleans())
    def run(changes, transpose):
        path.write_bytes(broken(plain, changes))
        try:
            file = open_tensors(path, dtype=torch.bfloat16 if transpose else None)
            for name in file.names:
                matrix = len(file.shape(name)) == 2
                found = file.get(name, transpose=transpose and matrix)
                shape = file.shape(name)[::-1] if transpose and matrix else file.shape(name)
                assert tuple(found.shape) == shape
        except FormatError as error:
            assert path.name in str(error)
        else:
            accepted[True] += 1

    assert 0 < accepted[True] < MORE * CASES[kind]


# -- names ---------------------------------------------------------------------------------------

KNOWN = sorted({name for _, files in (SEEDS | REFUSED).values() for name in files})
parts = st.sampled_from(sorted({part for name in KNOWN for part in name.split("/")})) | st.text(
    max_size=6
)
names = st.sampled_from(KNOWN) | st.lists(parts, min_size=1, max_size=5).map("/".join)


def test_names():
    @fuzzed("names", st.lists(names, max_size=8))
    def run(listed):
        for one in find_saes(listed):
            assert one.weights in listed and set(one.configs) <= set(listed) and one.families


# -- whole checkpoints ---------------------------------------------------------------------------


def check(sae: SAE) -> None:
    for name, value in sae.state_dict().items():
        assert value.isfinite().all(), name
    assert sae.W_enc.shape[0] == sae.W_dec.shape[0] and sae.W_enc.numel() and sae.W_dec.numel()
    json.dumps(sae.metadata, allow_nan=True)  # can be printed and saved


def outcome(root: Path) -> bool:
    """Whether a folder is accepted; anything but the two errors that `read` promises escapes."""
    try:
        sae = read(root)
    except ALLOWED:
        return False
    check(sae)
    return True


def test_every_family_has_a_seed_that_loads(tmp_path):
    seen = set()
    for repo, files in SEEDS.values():
        root = write(tmp_path / repo, {name: content(name, one) for name, one in files.items()})
        sae = read(root)
        check(sae)
        seen.add(sae.metadata["format"])
    assert seen - {"saert"} == {family.name for family in FAMILIES} - set(REFUSED)
    for repo, files in REFUSED.values():
        root = write(tmp_path / repo, {name: content(name, one) for name, one in files.items()})
        with pytest.raises(FormatError):
            read(root)


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_of_a_checkpoint(seed, tmp_path):
    repo, files = SEEDS[seed]
    plain = {name: content(name, value) for name, value in files.items()}

    @fuzzed(f"bytes of {seed}", st.integers(0, len(files) - 1), cuts)
    def run(which, changes):
        name = sorted(plain)[which]
        outcome(write(tmp_path / repo, plain | {name: broken(plain[name], changes)}))


@pytest.mark.parametrize("seed", SEEDS | REFUSED)
def test_edits_of_a_checkpoint(seed, tmp_path):
    repo, files = (SEEDS | REFUSED)[seed]

    @fuzzed(f"edits of {seed}", edits)
    def run(changes):
        try:
            changed = {name: content(name, one) for name, one in edited(files, changes).items()}
        except Exception:  # what cannot even be written
            return
        outcome(write(tmp_path / repo, changed))
