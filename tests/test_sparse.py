"""SparseCode is a lossless, sliceable stand-in for [*tokens, num_latents]."""

import dataclasses

import pytest
import torch

from saert.sparse import SparseCode


def random_dense(*shape: int, keep: float = 0.3) -> torch.Tensor:
    x = torch.randn(*shape)
    return x * (torch.rand(*shape) < keep)


@pytest.fixture
def code() -> SparseCode:
    return SparseCode.from_dense(random_dense(2, 5, 12))


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 5, 12), (2, 0, 12), (0, 12), (3, 1)])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_dense_survives_the_round_trip(shape, keep):
    x = random_dense(*shape, keep=keep)
    code = SparseCode.from_dense(x)
    torch.testing.assert_close(code.to_dense(), x, rtol=0, atol=0)
    assert code.shape[:-1] == x.shape[:-1]
    assert code.num_latents == x.shape[-1]
    assert code.indices.dtype == torch.int64
    assert ((code.indices >= 0) & (code.indices < x.shape[-1])).all()


def test_k_is_the_widest_token_and_at_least_one():
    x = torch.zeros(4, 9)
    assert SparseCode.from_dense(x).k == 1
    x[1, [2, 5, 7]], x[2, 0] = torch.tensor([-3.0, 1.0, 2.0]), 4.0
    code = SparseCode.from_dense(x)
    assert code.k == 3
    assert code.l0().tolist() == [0, 3, 1, 0]
    assert code.l0().dtype == torch.int64


def test_slots_come_largest_magnitude_first_and_keep_their_sign():
    code = SparseCode.from_dense(torch.tensor([[0.5, -4.0, 0.0, 2.0]]))
    assert code.values.tolist() == [[-4.0, 2.0, 0.5]]
    assert code.indices.tolist() == [[1, 3, 0]]


def test_slots_of_one_latent_add_up_in_the_dense_form():
    code = SparseCode(torch.tensor([[4, 4, 0]]), torch.tensor([[1.0, 2.0, 0.0]]), 5)
    assert code.to_dense().tolist() == [[0, 0, 0, 0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dense_form_has_the_dtype_of_the_values(dtype):
    x = random_dense(3, 6).to(dtype)
    dense = SparseCode.from_dense(x).to_dense()
    assert dense.dtype == dtype
    assert dense.equal(x)


def test_at_reads_the_columns_of_the_dense_form(code):
    dense = code.to_dense()
    chosen = torch.tensor([3, 0, 11, 3])
    torch.testing.assert_close(code.at(chosen), dense[..., chosen], rtol=0, atol=0)


def test_at_reads_other_latents_in_every_row(code):
    dense = code.to_dense()
    chosen = torch.tensor([[[3, 0]], [[11, 3]]])  # [batch, 1, E]
    expected = dense.gather(-1, chosen.expand(2, 5, 2))
    torch.testing.assert_close(code.at(chosen), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "tokens",
    [
        0,
        -1,
        (1, -1),
        slice(1, None),
        (slice(None), slice(0, 4, 2)),
        (slice(None), 3),
        (None, 0),
        torch.tensor([1, 0, 1]),
        torch.tensor([True, False]),
        torch.tensor([[True, False, True, False, True], [False] * 5]),
        [1, 0],
    ],
    ids=str,
)
def test_indexing_tokens_equals_indexing_the_dense_form(code, tokens):
    part = code[tokens]
    torch.testing.assert_close(part.to_dense(), code.to_dense()[tokens], rtol=0, atol=0)
    assert part.k == code.k


@pytest.mark.parametrize("slots", [(0, 0, 0), (slice(None), slice(None), 0), (0, 0, slice(0, 1))])
def test_indexing_slots_is_refused(code, slots):
    assert code.k > 1
    with pytest.raises(IndexError, match="slot|too many"):
        code[slots]


@pytest.mark.parametrize(
    "slots", [(slice(None), 0), torch.eye(3, dtype=torch.bool)], ids=["column", "mask"]
)
def test_indexing_slots_is_refused_when_there_are_k_tokens(slots):
    code = SparseCode(torch.arange(9).view(3, 3), torch.ones(3, 3), 9)
    with pytest.raises(IndexError):
        code[slots]


def test_indexing_a_single_token_is_refused(code):
    with pytest.raises(IndexError):
        code[0, 0][0]


@pytest.mark.parametrize("dim", [0, 1])
def test_cat_joins_codes_of_different_k(dim):
    wide, narrow = random_dense(2, 3, 8, keep=0.9), random_dense(2, 3, 8, keep=0.2)
    codes = [SparseCode.from_dense(wide), SparseCode.from_dense(narrow)]
    assert codes[0].k > codes[1].k
    joined = SparseCode.cat(codes, dim)
    assert joined.k == codes[0].k
    torch.testing.assert_close(joined.to_dense(), torch.cat([wide, narrow], dim), rtol=0, atol=0)


def test_cat_refuses_codes_of_different_dictionaries(code):
    other = SparseCode(code.indices, code.values, code.num_latents + 1)
    with pytest.raises(ValueError, match="num_latents"):
        SparseCode.cat([code, other], 0)


def test_widen_adds_unused_slots(code):
    wide = code.widen(code.k + 3)
    assert wide.k == code.k + 3
    assert wide.to_dense().equal(code.to_dense())
    assert wide.l0().equal(code.l0())


def test_widen_never_drops_slots(code):
    with pytest.raises(ValueError):
        code.widen(1)


def test_to_dtype_converts_the_values_alone(code):
    half = code.to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16
    assert half.indices is code.indices
    assert code.values.dtype == torch.float32


@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=["str", "device"])
def test_to_device_moves_both_tensors(code, device):
    moved = code.to(device)
    assert moved.indices.device.type == moved.values.device.type == "meta"
    assert moved.num_latents == code.num_latents


def test_gradients_flow_through_the_dense_form_and_stop_at_detach():
    x = random_dense(3, 6).requires_grad_()
    code = SparseCode.from_dense(x)
    assert not code.detach().values.requires_grad
    (code.to_dense() * torch.arange(6.0)).sum().backward()
    active = x != 0
    assert x.grad[active].equal(torch.arange(6.0).expand(3, 6)[active])


def test_a_code_is_frozen(code):
    with pytest.raises(dataclasses.FrozenInstanceError):
        code.values = torch.zeros(1)


@pytest.mark.parametrize(
    ("indices", "values", "error", "match"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, 4),
            ValueError,
            r"\(2, 3\).*\(2, 4\)",
        ),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), TypeError, "int32.*int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), TypeError, "float32.*int64"),
    ],
    ids=["shape", "int32", "float indices"],
)
def test_tensors_that_are_no_code_are_refused(indices, values, error, match):
    with pytest.raises(error, match=match):
        SparseCode(indices, values, 5)


def test_integer_values_are_refused():
    indices = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="values"):
        SparseCode(indices, indices, 5)
