"""refine: optimal by the KKT conditions, by the paper's method and by brute force, on any device.

The Triton solver runs on a GPU or in Triton's interpreter.
"""

import importlib.util
from itertools import product

import pytest
import torch
from torch.library import opcheck

from saert.kernels import dispatch
from saert.kernels import refine as module
from saert.kernels.refine import coordinate_descent, nnls, refine, refine_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
KINDS = ["random", "correlated", "duplicates", "zero rows", "unused slots", "poor start"]


def problem(kind="random", tokens=6, k=5, d=24, num_latents=30, dtype=F64):
    """indices, values, W_dec and a target that the code reconstructs only in part."""
    W = torch.randn(num_latents, d, dtype=F64)
    indices = torch.rand(tokens, num_latents).topk(k).indices
    values = torch.rand(tokens, k, dtype=F64) + 0.1
    truth = (values * 1.3 + 0.5 * torch.randn(tokens, k)).clamp_min(0)
    if kind == "correlated":
        W = W + W[:1]
    elif kind == "duplicates":
        indices[:, -1] = indices[:, 0]
    elif kind == "zero rows":
        W[indices[:, 0]] = 0
    elif kind == "unused slots":
        values[torch.rand(tokens, k) < 0.4] = 0
        values[0] = 0
    elif kind == "poor start":
        values *= torch.logspace(-3, 3, k, dtype=F64)
    target = (truth.unsqueeze(-1) * W[indices]).sum(-2) + torch.randn(tokens, d)
    moved = (x.to(DEVICE) for x in (values, W, target))
    values, W, target = (x.to(dtype) for x in moved)
    return indices.to(DEVICE), values, W, target


def objective(indices, values, W, target):
    """½ ‖target − z·D‖² in float64."""
    rows = W[indices.where(values > 0, 0)].double()
    error = target.double() - (values.double().unsqueeze(-1) * rows).sum(-2)
    return error.square().sum(-1) / 2


def violation(indices, values, W, target, used):
    """The KKT conditions, one token and slot after the other, in float64 and scale-free."""
    worst = []
    flat = (x.reshape(-1, x.shape[-1]) for x in (indices, values.double(), target.double(), used))
    for i, z, x, active in zip(*flat, strict=True):
        error = x - sum(z[j] * W[i[j]].double() for j in active.nonzero().flatten())
        worst.append(0.0)
        for j in active.nonzero().flatten():
            row = W[i[j]].double()
            if row.norm() > 0:
                slope = (row @ error) / (row.norm() * x.norm())  # > 0: z_j should grow
                size = z[j] * row.norm() / x.norm()
                worst[-1] = max(worst[-1], float(slope if slope > 0 else min(size, -slope)))
    return torch.tensor(worst, dtype=F64).view(values.shape[:-1])


@pytest.fixture(params=["torch", "triton"])
def solver(request, monkeypatch):
    """`refine` by both solvers; the second takes float32."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(dispatch, "uses_triton", lambda weights: weights.dtype != F64)
    else:
        monkeypatch.setattr(dispatch, "uses_triton", lambda weights: False)
    return request.param


# -- the optimum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_satisfies_the_kkt_conditions(kind):
    inputs = problem(kind)
    found = refine(*inputs, max_steps=20_000, tol=1e-9)
    used = inputs[1] > 0
    assert (found.values >= 0).all() and not found.values[~used].any()
    left = violation(inputs[0], found.values, *inputs[2:], used)
    assert left.max() <= 1.1e-9
    torch.testing.assert_close(found.residual.cpu(), left, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_method_finds_the_same_optimum(kind):
    inputs = problem(kind, tokens=3)
    found = refine(*inputs, max_steps=20_000, tol=1e-8)
    reference = refine_reference(*inputs, max_steps=20_000, tol=1e-8)
    best = objective(inputs[0], reference.values, *inputs[2:])
    assert found.residual.max() <= 1e-8 and reference.residual.max() <= 1e-8
    torch.testing.assert_close(objective(inputs[0], found.values, *inputs[2:]), best)
    if kind != "duplicates":  # there, only the sum of the twins is determined
        torch.testing.assert_close(found.values, reference.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_no_subset_of_the_slots_does_better(k):
    indices, values, W, target = problem(tokens=8, k=k, d=6)
    found = refine(indices, values, W, target, max_steps=10_000, tol=1e-10)
    for t in range(len(target)):
        best = target[t].square().sum() / 2
        for chosen in product([False, True], repeat=k):
            if not any(chosen):
                continue
            rows = W[indices[t]][torch.tensor(chosen)]
            z = torch.linalg.lstsq(rows.T, target[t].unsqueeze(-1)).solution.squeeze(-1)
            if (z >= 0).all():
                best = min(best, (target[t] - z @ rows).square().sum() / 2)
        reached = objective(indices[t], found.values[t], W, target[t])
        torch.testing.assert_close(reached, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_never_worse_than_its_start(kind, solver):
    inputs = problem(kind, tokens=4, dtype=torch.float32)
    before = objective(*inputs)
    for max_steps in (1, 40):
        found = refine(*inputs, max_steps=max_steps)
        after = objective(inputs[0], found.values, *inputs[2:])
        moved = found.steps > 0
        assert moved.any() and (after[moved] < before[moved]).all()
        assert torch.equal(found.values[~moved], inputs[1][~moved])
    done = found.residual <= 1e-4
    assert done.float().mean() > 0.5 and (found.steps[~done] == 40).all()
    left = violation(inputs[0], found.values, *inputs[2:], inputs[1] > 0)
    torch.testing.assert_close(found.residual.cpu().double(), left, rtol=0, atol=2e-6)


def test_every_sweep_lowers_the_objective():
    inputs = problem("poor start", tokens=8, k=9)
    found = [refine(*inputs, max_steps=n, tol=0.0) for n in range(6)]
    objectives = torch.stack([objective(inputs[0], f.values, *inputs[2:]) for f in found])
    assert torch.equal(found[0].values, inputs[1])
    assert (objectives.diff(dim=0) < 0).all()
    assert [f.steps.unique().tolist() for f in found] == [[n] for n in range(6)]


def test_the_best_scale_of_one_slot_has_a_closed_form(solver):
    indices, values, W, target = problem(k=1, dtype=torch.float32)
    rows = W[indices[:, 0]].double()
    best = ((rows * target).sum(-1) / rows.square().sum(-1)).clamp_min(0)
    found = refine(indices, values, W, target).values
    torch.testing.assert_close(found[:, 0].double(), best, rtol=1e-5, atol=1e-6)


# -- stopping --------------------------------------------------------------------------------------


def test_a_token_within_tol_keeps_its_values_to_the_last_bit(solver):
    indices, values, W, target = problem(tokens=5, k=3, dtype=torch.float32)
    once = refine(indices, values, W, target, tol=1e-5)
    again = refine(indices, once.values, W, target, tol=2e-5)
    mixed = once.values.where((torch.arange(5, device=DEVICE) < 3).unsqueeze(-1), values)
    mixed[:3] += 1e-30  # a value that became 0 would be an unused slot
    both = refine(indices, mixed, W, target, tol=2e-5)
    assert (once.steps > 0).all() and not again.steps.any()
    assert torch.equal(again.values, once.values)
    assert both.steps[:3].tolist() == [0, 0, 0] and (both.steps[3:] > 0).all()
    assert torch.equal(both.values[:3], mixed[:3])


def test_scale_changes_nothing_but_the_scale():
    indices, values, W, target = problem(dtype=torch.float32)
    plain = refine(indices, values, W, target)
    scaled = refine(indices, values * 2**17, W * 2**-7, target * 2**10)  # exact in binary
    assert torch.equal(scaled.values, plain.values * 2**17)
    assert torch.equal(scaled.residual, plain.residual)
    assert torch.equal(scaled.steps, plain.steps)


def test_tokens_do_not_depend_on_their_neighbours():
    inputs = problem("correlated", tokens=4, k=4, dtype=torch.float32)
    together = refine(*inputs)
    assert len(together.steps.unique()) > 1, "all tokens stopped at once: the test proves nothing"
    for t in range(4):
        indices, values, W, target = inputs
        alone = refine(indices[t], values[t], W, target[t])
        torch.testing.assert_close(alone.values, together.values[t], rtol=1e-4, atol=1e-5)
        assert abs(int(alone.steps) - int(together.steps[t])) <= 1


# -- edges -----------------------------------------------------------------------------------------


def test_unused_slots_stay_empty_whatever_they_name(solver):
    indices, values, W, target = problem("unused slots", tokens=4, dtype=torch.float32)
    expected = refine(indices, values, W, target).values
    unused = values == 0
    indices[unused], values[unused] = -(10**12), -1.0
    found = refine(indices, values, W, target)
    assert torch.equal(found.values, expected) and not found.values[unused].any()
    assert found.steps[0] == 0 and found.residual[0] == 0  # the token without an active slot


def test_a_zero_row_keeps_its_value_and_disturbs_nobody(solver):
    indices, values, W, target = problem("zero rows", tokens=3, k=4, dtype=torch.float32)
    found = refine(indices, values, W, target, tol=1e-5).values
    zero = (W[indices] == 0).all(-1)
    assert zero.any() and torch.equal(found[zero], values[zero])
    without = refine(indices, values.where(~zero, 0), W, target, tol=1e-5).values
    torch.testing.assert_close(found.where(~zero, 0), without)


def test_a_zero_target_gives_zeros(solver):
    indices, values, W, target = problem(tokens=4, k=3, dtype=torch.float32)
    target[2] = 0
    found = refine(indices, values, W, target)
    assert not found.values[2].any() and found.steps[2] == 0 and found.residual[2] == 0
    assert found.values[3].any() and found.values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(dtype):
    indices, values, W, target = problem(dtype=torch.float32)
    W = W.to(dtype)
    found, expected = refine(indices, values, W, target), refine(indices, values, W.float(), target)
    assert found.values.dtype == found.residual.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = refine(indices, values, W.float(), target)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_shapes_dtypes_and_leading_dimensions(solver):
    indices, values, W, target = problem(tokens=6, k=2, dtype=torch.float32)
    flat = refine(indices, values, W, target)
    assert flat.steps.dtype == torch.int64
    cube = [x.unflatten(0, (2, 3)) for x in (indices, values, target)]
    found = refine(cube[0], cube[1], W, cube[2])
    assert found.values.shape == (2, 3, 2) and found.residual.shape == found.steps.shape == (2, 3)
    assert torch.equal(found.values.flatten(0, 1), flat.values)
    empty = refine(cube[0][:0], cube[1][:0], W, cube[2][:0])
    assert empty.values.shape == (0, 3, 2) and empty.steps.shape == (0, 3)
    none = refine(indices[:, :0], values[:, :0], W, target)
    assert none.values.shape == (6, 0) and not none.residual.any() and not none.steps.any()
    assert refine(indices, values, W.double(), target).values.dtype == F64


def test_chunks_do_not_show(monkeypatch, solver):
    inputs = problem(tokens=5, k=3, dtype=torch.float32)
    expected = refine(*inputs)
    monkeypatch.setattr(module, "WORKSPACE", 2 * 3 * 3 * 4)  # two Gram matrices, one gather
    found = refine(*inputs)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)
    assert (found.steps - expected.steps).abs().max() <= 1  # other batches, other rounding


def test_a_broken_decoder_row_gives_nan_to_those_who_use_it(solver):
    indices, values, W, target = problem(tokens=3, k=3, num_latents=60, dtype=torch.float32)
    W[indices[2, 2], 3], W[indices[1, 0], 0] = torch.nan, torch.inf
    found = refine(indices, values, W, target)
    broken = (indices == indices[2, 2]).any(-1) | (indices == indices[1, 0]).any(-1)
    assert not broken.all() and found.values[broken].isnan().all()
    assert torch.equal(found.residual.isnan(), broken) and found.values[~broken].isfinite().all()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_tokens_that_are_not_finite_are_counted(poison):
    indices, values, W, target = problem(tokens=6)
    broken = target.clone()
    broken[[1, 4], 3] = poison
    with pytest.raises(ValueError, match="2 of 6 tokens have a NaN or an infinity in target"):
        refine(indices, values, W, broken)
    values[5] = poison
    with pytest.raises(ValueError, match="1 of 6 tokens have a NaN or an infinity in values"):
        refine(indices, values, W, target)


def test_shapes_that_contradict_each_other_are_named():
    indices, values, W, target = problem()
    with pytest.raises(ValueError, match=r"indices are \[6, 5\] and values \[6, 4\], expected"):
        refine(indices, values[:, 1:], W, target)
    with pytest.raises(ValueError, match=r"target is \[6, 23\], expected \[6, 24\]"):
        refine(indices, values, W, target[:, 1:])
    with pytest.raises(ValueError, match=r"target is \[5, 24\], expected \[6, 24\]"):
        refine(indices, values, W, target[1:])
    with pytest.raises(ValueError, match=r"W_dec is \[24\], expected \[num_latents, d\]"):
        refine(indices, values, W[0], target)
    for wrong in ({"max_steps": -1}, {"tol": -1e-4}, {"tol": float("nan")}):
        with pytest.raises(ValueError, match="expected neither to be negative"):
            refine(indices, values, W, target, **wrong)


@pytest.mark.parametrize("name", ["values", "W_dec", "target"])
def test_a_backward_pass_is_refused_by_name(name):
    indices, *floats = problem()
    place = ["values", "W_dec", "target"].index(name)
    floats[place] = floats[place].requires_grad_()
    found = refine(indices, *floats)
    with pytest.raises(RuntimeError, match="refine is not differentiable: call it under"):
        found.values.sum().backward()
    with torch.no_grad():
        assert not refine(indices, *floats).values.requires_grad


def test_the_operator_keeps_torchs_rules():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dtype in (torch.float32, torch.bfloat16):
        indices, values, W, target = problem(dtype=torch.float32)
        opcheck(nnls, (indices, values, W.to(dtype), target, 3, 1e-4), test_utils=checks)


# -- the two solvers -------------------------------------------------------------------------------


def gram_problem(tokens, k, dead=0):
    rows = torch.nn.functional.normalize(torch.randn(tokens, k, 2 * k + 3, device=DEVICE), dim=-1)
    rows[:, :dead] = 0
    target = torch.nn.functional.normalize(torch.randn(tokens, 1, 2 * k + 3, device=DEVICE), dim=-1)
    gram = rows @ rows.mT
    gram.diagonal(dim1=1, dim2=2).copy_((rows != 0).any(-1))
    start = torch.rand(tokens, k, device=DEVICE) / k**0.5
    start[:, :dead] = 0
    return gram, (rows @ target.mT).squeeze(-1), start


@pytest.mark.parametrize(("k", "dead"), [(1, 0), (5, 0), (4, 4), (33, 3)])
@pytest.mark.parametrize(("max_steps", "tol"), [(0, 0.0), (1, 0.0), (3, 0.0), (60, 1e-2)])
def test_the_triton_solver_is_the_torch_solver(k, dead, max_steps, tol):
    pytest.importorskip("triton")
    from saert.kernels.gpu import refine as gpu

    gram, linear, start = gram_problem(2, k, dead)
    found = gpu.coordinate_descent(gram, linear, start, max_steps, tol)
    expected = coordinate_descent(gram, linear, start, max_steps, tol)
    exact = coordinate_descent(
        gram.double(), linear.double(), start.double(), int(expected[2].max()), 0.0
    )
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64]
    assert (found[2] - expected[2]).abs().max() <= (DEVICE == "cuda")  # fused multiply-adds there
    if tol == 0:
        error, budget = ((x[0] - exact[0]).abs().max() for x in (found, expected))
        assert error <= 2 * budget + 4 * 2**-24
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5 if tol else 1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=1e-6)
    again = gpu.coordinate_descent(gram, linear, start, max_steps, tol)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_triton_solver_on_views_and_nothing():
    pytest.importorskip("triton")
    from saert.kernels.gpu import refine as gpu

    gram, linear, start = gram_problem(2, 5)
    expected = gpu.coordinate_descent(gram, linear, start, 9, 1e-5)
    views = (gram.mT.contiguous().mT, linear.T.contiguous().T, start.T.contiguous().T)
    found = gpu.coordinate_descent(*views, 9, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for nothing in (gram_problem(0, 3), gram_problem(2, 0)):
        values, residual, steps = gpu.coordinate_descent(*nothing, 9, 1e-5)
        assert values.shape == nothing[2].shape and not residual.any() and not steps.any()


def test_triton_is_imported_only_when_it_is_used():
    assert importlib.util.find_spec("saert.kernels.refine") is not None
    assert not hasattr(module, "triton")


@pytest.mark.gpu
def test_wide_codes_on_the_device():
    from saert.kernels.gpu import refine as gpu

    for k in (256, 700):  # one warp, and several
        gram, linear, start = gram_problem(64, k)
        found = gpu.coordinate_descent(gram, linear, start, 50, 1e-4)
        expected = coordinate_descent(gram, linear, start, 50, 1e-4)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
