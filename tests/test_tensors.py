"""Weights files: every container reads alike, within the memory of its weights, and safely."""

import collections
import copy
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saert.hub.errors import FormatError
from saert.hub.files.parse import read_config
from saert.hub.files.pickles import MOST_BYTES as MOST_PICKLE
from saert.hub.files.tensors import open_tensors
from saert.hub.sources.folder import Folder

# -- the same tensors from every container -------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    """Shapes, dtypes and strides that checkpoints hold."""
    return {
        "W_enc": torch.randn(300, 77),
        "tall": torch.randn(2000, 3),
        "bias": torch.randn(5).double(),
        "scalar": torch.tensor(3.5),
        "half": torch.randn(64, 40).half(),
        "k": torch.tensor(7),
        "sizes": torch.arange(4, dtype=torch.int32),
        "transposed": torch.randn(40, 90).T,
        "slice": torch.randn(20, 30)[:, 3:7],
        "rows": torch.randn(20, 30)[3:9],
        "cube": torch.randn(3, 4, 5),
        "turned cube": torch.randn(3, 4, 5).permute(2, 1, 0),
    }


def write(path: Path, found: dict[str, torch.Tensor], **options) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in found.items()}, path)
    elif path.suffix == ".npz":
        save = np.savez_compressed if options else np.savez
        save(path, **{name: t.numpy() for name, t in found.items()})
    else:
        torch.save(found, path, **options)
    return path


CONTAINERS = {
    "safetensors": ("w.safetensors", {}),
    "npz": ("w.npz", {}),
    "npz, compressed": ("w.npz", {"compressed": True}),
    "pt": ("w.pt", {}),
    "pt, protocol 4": ("w.pth", {"pickle_protocol": 4}),
    "pt, legacy": ("w.bin", {"_use_new_zipfile_serialization": False}),
}


@pytest.fixture(params=CONTAINERS)
def container(request, tmp_path):
    name, options = CONTAINERS[request.param]
    return lambda found: write(tmp_path / name, found, **options)


def test_tensors_are_read_as_they_were_written(container):
    expected = tensors()
    file = open_tensors(container(expected))
    assert file.names == set(expected)
    for name, one in expected.items():
        assert (file.shape(name), file.stored_dtype(name)) == (tuple(one.shape), one.dtype), name
        found = file.get(name)
        assert found.equal(one) and found.dtype == one.dtype and found.is_contiguous(), name
        if one.dim() == 2:
            found = file.get(name, transpose=True)
            assert found.equal(one.T) and found.is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_take_the_dtype_asked_for_and_integers_keep_theirs(container, dtype):
    expected = tensors()
    file = open_tensors(container(expected), dtype=dtype)
    for name, one in expected.items():
        for transpose in (False, True) if one.dim() == 2 else (False,):
            found, wanted = file.get(name, transpose=transpose), one.T if transpose else one
            assert found.equal(wanted.to(dtype) if one.is_floating_point() else wanted), name
    wide = dtype if dtype == torch.float64 else torch.float32
    assert file.get("bias", compared=True).dtype == file.get("half", exact=True).dtype == wide


def test_compared_tensors_keep_a_stored_half_precision(container):
    file = open_tensors(container(tensors()))
    assert file.get("half", compared=True).dtype == torch.float16
    assert file.get("half", exact=True).dtype == torch.float32


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_bfloat16(tmp_path, name):
    one = torch.randn(33, 8).bfloat16()
    found = open_tensors(write(tmp_path / name, {"W": one})).get("W", transpose=True)
    assert found.equal(one.T) and found.dtype == torch.bfloat16


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_pt_holds_beside_tensors(tmp_path, legacy):
    state = torch.nn.Sequential(torch.nn.Linear(4, 5)).state_dict()  # ordered, with attributes
    state["parameter"] = torch.nn.Parameter(torch.randn(3, 2))
    beside = {
        "activation": "TopK",
        "activation_state_dict": {"k": 32, "postact_fn": None, "flags": [True, 2.5, (1, -7)]},
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
    }
    inner = {"inner": collections.OrderedDict(ae={"W": torch.zeros(3)})}
    torch.save(state | beside | inner, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    file = open_tensors(tmp_path / "a.pt")
    assert file.names == set(state)
    for name, one in state.items():
        assert file.get(name).equal(one.detach())
    found = dict(file.extras)
    assert list(found.pop("inner")["ae"]) == ["W"]  # named, but not read
    assert found == beside | {"size": (2, 3), "device": "cpu"}


def test_tensors_that_share_a_storage(tmp_path):
    W = torch.randn(6, 4)
    torch.save({"W_enc": W, "W_dec": W, "b": W[2]}, tmp_path / "a.pt")
    file = open_tensors(tmp_path / "a.pt")
    one, other = file.get("W_enc"), file.get("W_dec")
    one.zero_()
    assert other.equal(W) and file.get("b").equal(W[2])


def test_what_is_loaded_no_longer_looks_at_the_file(container):
    expected = {"W": torch.randn(700, 500), "b": torch.randn(9)}
    path = container(expected)
    file = open_tensors(path)
    found = {name: file.get(name) for name in expected}
    with open(path, "r+b") as raw:
        raw.write(b"\xff" * path.stat().st_size)
    assert all(found[name].equal(one) for name, one in expected.items())


def test_large_tensors_are_tensors_like_any(container):
    """Their memory is not torch's own."""
    W = torch.randn(700, 500)
    found = open_tensors(container({"W": W})).get("W", transpose=True)
    assert found.data_ptr() % 64 == 0
    copied, pickled = copy.deepcopy(found), pickle.loads(pickle.dumps(found))
    part = found[3:5]
    del found
    assert part.equal(W.T[3:5]) and copied.equal(W.T) and pickled.equal(W.T)
    part.add_(1)
    assert part.share_memory_().equal(W.T[3:5] + 1)


def test_an_unknown_name_lists_the_known_ones(container):
    with pytest.raises(FormatError, match=r"no tensor 'W_dec'; it holds \['b'\]"):
        open_tensors(container({"b": torch.zeros(2)})).get("W_dec")


def test_a_vector_has_no_transpose(container):
    with pytest.raises(FormatError, match=r"b is \[2\], expected a matrix"):
        open_tensors(container({"b": torch.zeros(2)})).get("b", transpose=True)


def test_a_matrix_of_integers_is_no_weight(container):
    with pytest.raises(FormatError, match="W holds torch.int64, expected floats"):
        open_tensors(container({"W": torch.ones(2, 2).long()})).get("W")


# -- memory --------------------------------------------------------------------------------------

# Every case in a fork of its own, after a tiny file: what importing and the first call of torch's
# kernels need is there already, and is not counted.
PEAK = """
import json, os, sys
import torch
from pathlib import Path
from saert.hub.files.tensors import open_tensors
torch.set_num_threads(1)

def status(field):
    line = [one for one in open("/proc/self/status") if one.startswith(field)]
    return 1024 * int(line[0].split()[1])

def read(path, transpose, dtype):
    file = open_tensors(Path(path), dtype=getattr(torch, dtype) if dtype else None)
    return [file.get(name, transpose=transpose) for name in sorted(file.names)]

def peak(path, tiny, transpose, dtype):
    there, here = os.pipe()
    if os.fork() == 0:
        read(tiny, transpose, dtype)
        before = status("VmRSS")
        weights = sum(one.numel() * one.itemsize for one in read(path, transpose, dtype))
        os.write(here, json.dumps([weights, status("VmHWM") - before]).encode())
        os._exit(0)
    os.close(here)
    return json.loads(os.read(there, 1000))

print(json.dumps([peak(*one) for one in json.loads(sys.argv[1])]))
"""


def measure(cases: list[tuple]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps(cases)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for (path, _, *how), (weights, needed) in zip(cases, json.loads(done.stdout), strict=True):
        assert 0.9 * weights < needed <= 1.2 * weights, (Path(path).name, how, needed / weights)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_reading_needs_the_weights_and_a_small_buffer(tmp_path):
    """At most 1.2 times the weights, in every container, order and dtype."""
    (tmp_path / "tiny").mkdir()
    pairs = []
    for folder, rows in ((tmp_path / "tiny", 64), (tmp_path, 1024)):
        W = torch.randn(rows, 24_576)
        turned = {"W": W.T}  # column-major in npz and pt
        small = {"W": W.where(W > 1, 0.0)}
        pairs.append(
            [
                write(folder / "w.safetensors", {"W": W}),
                write(folder / "w.npz", {"W": W}),
                write(folder / "turned.npz", turned),
                write(folder / "w.pt", {"W": W}),
                write(folder / "turned.pt", turned),
                write(folder / "w.bin", {"W": W}, _use_new_zipfile_serialization=False),
                write(folder / "small.npz", small, compressed=True),
            ]
        )
    ways = [(False, None), (True, "bfloat16")]
    cases = [(b, a, *way) for a, b in zip(*pairs, strict=True) for way in ways]
    cases += [(pairs[1][0], pairs[0][0], *way) for way in [(True, None), (False, "double")]]
    measure([(str(path), str(tiny), *way) for path, tiny, *way in cases])


# -- malformed files -----------------------------------------------------------------------------


def header(changes: dict, data: bytes = bytes(24)) -> bytes:
    text = json.dumps(changes).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (6,), offsets: object = (0, 24), **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_the_header_that_the_next_tests_break_is_right(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(header({"__metadata__": {"a": "b"}, "W": entry()}))
    assert open_tensors(tmp_path / "w.safetensors").get("W").equal(torch.zeros(6))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"{}", "header of"),
        (struct.pack("<Q", 1 << 62), "a header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 5 << 20) + bytes(6 << 20), "expected at most 4194304"),
        (struct.pack("<Q", 8) + b"\xff" * 8, "found UnicodeDecodeError"),
        (struct.pack("<Q", 8) + b"{\"W\": 1 ", "found JSONDecodeError"),
        (header([1]), "the header is a list"),
        (header({"W": 5}), "expected the tensors of a .safetensors file; found TypeError"),
        (header({"W": entry("F8_E4M3", (24,))}), "W holds F8_E4M3, expected one of F64, F32"),
        (header({"W": entry("C64", (3,))}), "W holds C64"),
        (header({"W": entry("BOOL", (24,))}), "W holds BOOL"),
        (header({"W": entry(shape=[2, -3])}), r"W is \[2, -3\], expected dimensions of at least 1"),
        (header({"W": entry(shape=[0, 6], offsets=(0, 0))}, b""), r"W is \[0, 6\]"),
        (header({"W": entry(shape=[2.0, 3])}), r"W is \[2.0, 3\]"),
        (header({"W": entry(shape=[True, 6])}), r"W is \[True, 6\]"),
        (header({"W": entry(shape="6")}), "W is described by"),
        (header({"W": entry(extra=1)}), "W is described by"),
        (header({"W": entry(shape=[1 << 62, 1 << 62])}), "W has 24 bytes, expected"),
        (header({"W": entry(shape=[5])}), "W has 24 bytes, expected 20"),
        (header({"W": entry(offsets=(24, 0))}), "W has -24 bytes"),
        (header({"W": entry(offsets=(0, 24, 9))}), "found ValueError"),
        (header({"W": entry(offsets=(8, 32))}, bytes(32)), "starts at byte 8, expected 0"),
        (header({"W": entry()}, bytes(23)), "truncated"),
        (header({"W": entry()}, bytes(25)), "truncated, or not its file"),
        (header({"W": entry(), "V": entry()}), "starts at byte 0, expected 24"),
        (struct.pack("<Q", 16) + b'{"W": 1, "W": 2}', "the key 'W' twice"),
        (struct.pack("<Q", 1 << 20) + b"[" * (1 << 20), "RecursionError"),
    ],
)  # fmt: skip
def test_malformed_safetensors(tmp_path, content, match):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=f"w.safetensors: .*{match}"):
        open_tensors(tmp_path / "w.safetensors")


def npy(descr="'<f4'", fortran=False, shape="(6,)", data=bytes(24), magic=b"\x93NUMPY\1\0"):
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return magic + struct.pack("<H", len(text)) + text + data


def archive(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def test_the_member_that_the_next_tests_break_is_right(tmp_path):
    file = open_tensors(archive(tmp_path / "w.npz", [("W.npy", npy())]))
    assert file.get("W").equal(torch.zeros(6))


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("W.txt", npy())], "member 'W.txt', expected arrays"),
        ([("W.npy", b"")], "W starts with b''"),
        ([("W.npy", npy(magic=b"\x93NUMPY\x09\0"))], "W starts with"),
        ([("W.npy", npy()[:9])], "W has the header"),
        ([("W.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff")], "W has a header of 4294967295 bytes"),
        ([("W.npy", npy("'|O'"))], r"W holds '\|O', expected one of <f8"),
        ([("W.npy", npy("[('a', '<f4')]"))], "W holds"),
        ([("W.npy", npy("'>f4'"))], "W holds '>f4'"),
        ([("W.npy", npy("'<c8'"))], "W holds '<c8'"),
        ([("W.npy", npy("'|b1'"))], "W holds"),
        ([("W.npy", npy("__import__('os')"))], "W has the header"),
        ([("W.npy", npy(shape="(2, -3)"))], "W has the header"),
        ([("W.npy", npy(shape="(0, 6)"))], r"W is \[0, 6\]"),
        ([("W.npy", npy(shape="(99999999999, 99999999999)"))], "W has 24 bytes, expected 3999"),
        ([("W.npy", npy(shape="(" + "9" * 4000 + ",)"))], "header of|digits|has 24 bytes"),
        ([("W.npy", npy(shape="(5,)"))], "W has 24 bytes, expected 20"),
        ([("W.npy", npy(shape="(7,)"))], "W has 24 bytes, expected 28"),
        ([("W.npy", npy()), ("W.npy", npy())], "several members 'W.npy'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_malformed_npz(tmp_path, members, match):
    archive(tmp_path / "w.npz", members)
    with pytest.raises(FormatError, match=f"w.npz: .*({match})"):
        open_tensors(tmp_path / "w.npz")


def test_an_npz_with_a_pickle_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "w.npz", W=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match=r"W holds '\|O'"):
        open_tensors(tmp_path / "w.npz")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", W=np.zeros((4096, 8192), np.float32))
    assert (tmp_path / "w.npz").stat().st_size < 1 << 20
    with pytest.raises(FormatError, match="unpacks to .* bytes, more than 32 times its size"):
        open_tensors(tmp_path / "w.npz")


def test_an_archive_with_endless_members_is_refused(tmp_path):
    archive(tmp_path / "w.npz", [(f"{i:0200}", b"") for i in range(20_000)])
    with pytest.raises(FormatError, match="bytes at once, expected at most"):
        open_tensors(tmp_path / "w.npz")


def test_a_wrong_checksum_is_found(tmp_path):
    W = torch.randn(50, 40)
    write(tmp_path / "w.npz", {"W": W})
    content = (tmp_path / "w.npz").read_bytes()
    at = content.index(W.numpy().tobytes()[:64])
    (tmp_path / "w.npz").write_bytes(content[:at] + b"\0\0\0\0" + content[at + 4 :])
    file = open_tensors(tmp_path / "w.npz")
    with pytest.raises(FormatError, match="8000 bytes of W; found BadZipFile: Bad CRC"):
        file.get("W")


def test_a_file_that_shrinks_while_it_is_open(container):
    path = container({"W": torch.randn(300, 200)})
    file = open_tensors(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(FormatError, match=f"{path.name}: expected 240000 bytes of W; found"):
        file.get("W")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files(container, part):
    path = container(tensors())
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(FormatError, match=path.name):
        open_tensors(path)


def test_other_kinds_of_files_are_named(tmp_path):
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="w.gguf: expected one of .safetensors, .npz, .pt"):
        open_tensors(tmp_path / "w.gguf")
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "missing.safetensors")


# -- pickles -------------------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["value", "nested", "whole"])
def test_code_in_a_pickle_never_runs(tmp_path, legacy, place):
    target = tmp_path / "ran"
    content = {
        "value": {"W": torch.zeros(3), "x": Payload(target)},
        "nested": {"W": torch.zeros(3), "x": [{"y": (1, Payload(target))}]},
        "whole": Payload(target),
    }[place]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=r"w.pt: a pickle that calls (posix|nt).system"):
        open_tensors(tmp_path / "w.pt")
    assert not target.exists()


def test_a_plain_pickle_never_runs(tmp_path):
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(FormatError, match="w.pt: a pickle that calls posix.system"):
        open_tensors(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(3)], "holds a list, expected a dict"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear|NEWOBJ"),
        ({"W": torch.zeros(3, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"W": torch.zeros(3).bool()}, "W holds torch.bool"),
        ({"W": torch.zeros(3, dtype=torch.float8_e4m3fn)}, "float8_e4m3fn"),
        ({"W": torch.zeros(0, 4)}, r"W is \[0, 4\]"),
        ({"W": torch.zeros(1).expand(1000)}, "expected to lie within its storage of 4 bytes"),
        ({"W": torch.zeros(3).to_sparse()}, "a pickle that calls"),
        ({1: torch.zeros(3)}, "a int as a key"),
        ({"set": {1, 2}}, "a pickle"),
        ({"array": np.zeros(3)}, "a pickle that calls"),
    ],
)
def test_a_pt_that_holds_something_else(tmp_path, content, match):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(FormatError, match=f"w.pt: .*({match})"):
        open_tensors(tmp_path / "w.pt")


def edited(tmp_path: Path, old: bytes, new: bytes) -> Path:
    """A saved dict whose pickle was changed."""
    torch.save({"W": torch.zeros(300, 7)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    changed = [(name, c.replace(old, new) if name.endswith(".pkl") else c) for name, c in members]
    assert changed != members
    return archive(tmp_path / "edited.pt", changed)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"M,\x01K\x07", b"J\xff\xff\xff\x7fK\x07", "expected to lie within its storage"),
        (b"M,\x01K\x07", b"J\xff\xff\xff\xffK\x07", "not described as torch.save does"),
        (b"K\x07K\x01", b"M\xff\xffK\x01", "expected to lie within its storage"),
        (b"M4\x08", b"J4\x08\x00\x70", "data/0 has 8400 bytes, expected"),
        (b"K\x00M,\x01", b"M,\x01M,\x01", "expected to lie within its storage"),
        (b"K\x00M,\x01", b"(t)M,\x01", "not described as torch.save does"),
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor", "calls torch._utils._rebuild_qtensor"),
        (b"FloatStorage", b"QInt8Storage", "torch.QInt8Storage"),
        (b"X\x01\x00\x00\x00W", b"X\x01\x00\x00\x00V" + b"0", "IndexError|not|pickle"),
        (b"storage", b"starage", "a storage that is not described"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "no record data/9"),
        (b".", b"", "pickle"),
    ],
)
def test_a_pickle_that_was_tampered_with(tmp_path, old, new, match):
    path = edited(tmp_path, old, new)
    with pytest.raises(FormatError, match=f"edited.pt: .*({match})"):
        open_tensors(path)


def bomb(value: str) -> bytes:
    """A pickle of a dict whose only value names the one before it twice, forty times."""
    doubled = b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(40))
    return b"\x80\x02}" + b"X\x01\x00\x00\x00x" + b"]q\x00" + doubled + value.encode("latin-1")


@pytest.mark.parametrize(
    "program",
    [
        bomb("s."),  # a value that would print as 2^40 brackets
        bomb("0h\x28K\x01s."),  # as a key, whose hash would take as long
        bomb("0h\x28h\x28R."),  # as a function
        b"\x80\x02]" + b"r\xff\xff\xff\x7f" + b".",  # a memo of 2^31 entries
        b"\x80\x02X\xff\xff\xff\x7f.",  # text of 2 GB
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".",
        b"\x80\x02}X\x01\x00\x00\x00x" + b"]" * 100 + b"a" * 99 + b"s.",
        b"c" * (MOST_PICKLE + 1),
        b"",
    ],
)
def test_pickles_that_would_exhaust_the_machine(tmp_path, program):
    members = [("a/data.pkl", program), ("a/version", b"3\n")]
    path = archive(tmp_path / "w.pt", members)
    with pytest.raises(FormatError, match="w.pt: "):
        open_tensors(path)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a/b", b"")], "expected one data.pkl"),
        ([("a/data.pkl", b"\x80\x02}."), ("b/data.pkl", b"")], "expected one data.pkl"),
        ([("a/data.pkl", b"\x80\x02}."), ("a/constants.pkl", b"")], "a TorchScript module"),
        ([("a/data.pkl", b"\x80\x02}."), ("a/byteorder", b"big")], "big-endian"),
        ([("a/data.pkl", bytes(MOST_PICKLE + 1))], "expected at most 1048576"),
    ],
)
def test_archives_that_torch_save_did_not_write(tmp_path, members, match):
    with pytest.raises(FormatError, match=f"w.pt: .*{match}"):
        open_tensors(archive(tmp_path / "w.pt", members))


def test_compressed_records_are_refused(tmp_path):
    torch.save({"W": torch.zeros(300, 7)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    path = archive(tmp_path / "small.pt", members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="data/0 is compressed"):
        open_tensors(path)


def test_a_legacy_file_whose_storages_are_not_there(tmp_path):
    buffer = io.BytesIO()
    torch.save({"W": torch.zeros(300)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    (tmp_path / "w.pt").write_bytes(content[:-1208] + struct.pack("<q", 1 << 40) + bytes(1200))
    with pytest.raises(FormatError, match="has 1099511627776 elements, expected 300"):
        open_tensors(tmp_path / "w.pt")


# -- configs -------------------------------------------------------------------------------------


def config(tmp_path: Path, name: str, text: str | bytes) -> dict:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_config(tmp_path / name)


def test_configs_are_plain_objects(tmp_path):
    assert config(tmp_path, "a.json", '{"k": 1, "x": {"y": [null, 2.5]}}')["x"] == {
        "y": [None, 2.5]
    }
    text = "k: 1\nx: {1: [~, 2.5]}\nz: &a [3]\nw: *a\n"
    assert config(tmp_path, "a.yaml", text) == {"k": 1, "x": {"1": [None, 2.5]}, "z": [3], "w": [3]}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", '{"k": 1, "k": 2}', "not JSON .the key 'k' twice"),
        ("a.json", '{"x": {"k": 1, "k": 1}}', "twice"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", '{"a":' * 100 + "1" + "}" * 100, "nested too deeply"),
        ("a.json", '{"k": 1' + "0" * 5000 + "}", "not JSON"),
        ("a.json", " " * (4 << 20) + "{}", "expected a config of at most 4194304"),
        ("a.json", "null", "found a NoneType"),
        ("a.json", "{'k': 1}", "not JSON"),
        ("a.json", b"\xef\xbb\xbf{}", "not JSON"),
        ("a.yaml", "k: 1\nk: 2\n", "the key 'k' twice"),
        ("a.yaml", "1: 1\n'1': 2\n", "the key '1' twice"),
        ("a.yaml", BOMB, "too large when its repetitions are written out"),
        ("a.yaml", "a: &a {b: *a}", "nested too deeply"),
        ("a.yaml", "a: &a {b: 1}\nc: {<<: *a}", "not YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("a.yaml", "a: !!bool x", "not YAML"),
        ("a.yaml", "a: !!timestamp x", "not YAML"),
        ("a.yaml", "a: !!int ''", "not YAML"),
        ("a.yaml", "a: !!map [1]", "not YAML"),
        ("a.yaml", "? [1, 2]\n: 3", "a key that is no scalar"),
        ("a.yaml", "- " * 1500, "not YAML"),
        ("a.yaml", "- 1", "found a list"),
        ("a.yaml", "", "found a NoneType"),
        ("a.yaml", "a: 1\n---\na: 2", "not YAML"),
        ("a.yaml", "#" * (64 << 10) + "\na: 1", "expected a config of at most 65536"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, name, text, match):
    with pytest.raises(FormatError, match=f"{name}: .*{match}"):
        config(tmp_path, name, text)


# -- files of a folder ---------------------------------------------------------------------------


def test_links_inside_a_folder_are_followed(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert Folder(tmp_path).fetch("link").read_text() == "x"


def test_links_that_leave_the_folder_are_refused(tmp_path):
    root = tmp_path / "repo"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (root / "relative").symlink_to("../secret")
    (root / "a" / "absolute").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "ring").symlink_to("ring")
    for name in ("relative", "a/absolute", "folder/secret", "ring"):
        with pytest.raises(FormatError, match=f"repo/{name}: "):
            Folder(root).fetch(name)
    assert sorted(Folder(root).names()) == ["a/absolute", "relative", "ring"]


def test_a_snapshot_of_the_hub_cache_links_to_its_own_blobs_only(tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abcd"
    (snapshot / "x").mkdir(parents=True)
    for folder in (cache / "blobs", tmp_path / "models--evil--c" / "blobs"):
        folder.mkdir(parents=True)
        (folder / "hash").write_text(folder.parent.name)
    (snapshot / "x" / "w.pt").symlink_to("../../../blobs/hash")
    assert Folder(snapshot).fetch("x/w.pt").read_text() == "models--a--b"
    assert Folder(snapshot / "x").fetch("w.pt").read_text() == "models--a--b"
    (snapshot / "v.pt").symlink_to("../../../models--evil--c/blobs/hash")
    with pytest.raises(FormatError, match="expected a file inside the folder"):
        Folder(snapshot).fetch("v.pt")


def test_a_root_that_is_a_link_itself(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert Folder(tmp_path / "link").fetch("a").read_text() == "x"


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pt", "cfg.json"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    read = read_config if name == "cfg.json" else open_tensors
    with pytest.raises(FormatError, match=f"{name}: not a regular file"):
        read(tmp_path / name)
    with pytest.raises(FormatError, match=f"{name}: not a regular file"):
        Folder(tmp_path).fetch(name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(FormatError, match=f"{name}: not a regular file"):
        read(tmp_path / name)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=f"{name}: not a regular file"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a\\b", "a\0b", "", " "])
def test_names_that_leave_the_folder(tmp_path, name):
    with pytest.raises(FormatError, match="expected a file or folder inside the source"):
        Folder(tmp_path).fetch(name)


def test_a_missing_file_is_missing(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "broken").symlink_to("nothing")
    for name in ("b", "broken"):
        with pytest.raises(FileNotFoundError):
            Folder(tmp_path).fetch(name)
