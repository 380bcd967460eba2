"""Exact selections over a batch, against a dense sort of everything."""

import pytest
import torch
from objective_cases import a_dictionary

from saert.train.mesh import Mesh
from saert.train.selection import batch_largest, keep_largest, token_ranks


def dense_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool [T, n]: the largest positive entries, earlier tokens and then lower latents first."""
    flat = scores.flatten()
    best = flat.sort(descending=True, stable=True).indices[:count]
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[best] = True
    return (kept & (flat > 0)).view_as(scores)


def searched(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The same by `batch_largest`: the mask, the smallest kept, the widths it asked for."""
    widths = []

    def best(width):
        widths.append(width)
        found = scores.relu().sort(dim=-1, descending=True, stable=True)
        return found.indices[:, :width], found.values[:, :width]

    tokens, n = scores.shape
    indices, values, kept, least = batch_largest(best, tokens, k, n, Mesh())
    assert indices.shape == values.shape == kept.shape
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, kept)
    return mask, least, widths


def check(scores: torch.Tensor, k: int) -> list[int]:
    mask, least, widths = searched(scores, k)
    expected = dense_largest(scores, k * len(scores))
    assert torch.equal(mask, expected)
    assert least == (scores[expected].min() if expected.any() else 0)
    return widths


@pytest.mark.parametrize("k", [1, 3, 8])
def test_batch_largest_is_the_dense_flat_topk(k):
    draw = torch.Generator().manual_seed(k)
    check(torch.randn(30, 40, generator=draw, dtype=torch.float64), k)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_go_to_the_earlier_token_and_then_the_lower_latent(k):
    draw = torch.Generator().manual_seed(k)
    check(torch.randint(-1, 3, (17, 24), generator=draw).double(), k)
    check(torch.ones(6, 12), k)


def test_duplicated_rows_are_kept_from_the_first_on():
    row = torch.rand(32)
    mask, *_ = searched(row.repeat(7, 1), 1)
    assert torch.equal(mask, dense_largest(row.repeat(7, 1), 7))
    mask, *_ = searched(torch.cat([row.repeat(3, 1), 2 + row.repeat(2, 1)]), 2)
    assert mask[:3].sum() == 0 and mask[3:].sum(1).tolist() == [5, 5]


def test_a_token_that_takes_more_than_its_candidates_is_searched_again():
    scores = torch.rand(20, 64)
    scores[7] += 10  # all 64 entries beat every other token's, and 4 · k are the first candidates
    assert check(scores, 4) == [16, 32, 64]
    scores[7, 20:] = 0  # the last candidate decides: 20 are more than 16
    assert check(scores, 4) == [16, 32]
    assert check(torch.rand(20, 64) + 1, 64) == [64]  # everything is kept, and there is no more


def test_fewer_positive_entries_than_asked_for_are_all_kept():
    scores = torch.full((9, 20), -1.0)
    assert searched(scores, 2)[0].sum() == 0
    assert searched(scores, 2)[1] == 0
    scores[3, 5], scores[8, 0] = 0.5, 0.25
    check(scores, 2)
    scores[2] = 1  # one token with twenty, of which eight are candidates at first
    assert check(scores, 3) == [12, 20]


def test_a_selected_zero_is_not_kept():
    kept, least = keep_largest(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), 3, Mesh())
    assert kept.tolist() == [[True, False], [True, False]]
    assert least == 1


def test_the_ranks_of_one_process_are_the_columns():
    ranked = torch.tensor([[3.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(token_ranks(ranked, Mesh()), torch.arange(4).expand(2, 4))


def test_ranks_follow_the_values_where_the_slots_are_not_in_order():
    ranked = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert token_ranks(ranked, Mesh()).tolist() == [[3, 0, 2, 1]]


@pytest.mark.parametrize("copies", [1, 4])
def test_a_dictionarys_batch_topk_is_the_dense_one_with_duplicated_latents(copies):
    d = a_dictionary(32, dtype=torch.float64)
    with torch.no_grad():
        d.W_enc.copy_(d.W_enc[: 32 // copies].repeat(copies, 1))
    x = torch.randn(25, 16, dtype=torch.float64).repeat_interleave(2, 0)
    x[:4] *= 50  # they need every latent that they have
    code, least = d.batch_topk(x, 3, len(x))
    # equal scores of a matrix product may differ in their last digits, so the kernel's own
    scores = torch.zeros(50, 32, dtype=torch.float64)
    every = d.best(x, 32)
    scores.scatter_add_(1, every.indices, every.values.detach())
    expected = torch.where(dense_largest(scores, 150), scores, 0)
    found = torch.zeros_like(scores).scatter_add_(1, code.indices, code.values.detach())
    assert torch.equal(found, expected)
    assert (found > 0).sum() == 150 and least == found[found > 0].min()
