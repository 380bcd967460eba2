"""Ablation effects against whole forward passes with a plain hook and the paper's formulas."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sae_cases import make
from scipy.special import log_softmax
from tiny_models import ARCHITECTURES, HIDDEN, VOCAB, peft_wrap, tiny
from torch import Tensor, nn

from saert.activations import TopK
from saert.edits import ablate
from saert.hookpoint import Hookpoint, HookpointError
from saert.measure.ablation.ablate import ablation_effects, direction_effects
from saert.measure.ablation.replay import BruteForce, Replay, choose_runner
from saert.measure.ablation.table import COLUMNS, AblationEffects
from saert.runtime import attach
from saert.sae import SAE

SITES = (
    "embed", "resid_pre.1", "resid_mid.1", "attn_out.1", "mlp_out.1", "resid_post.0", "resid_post.2"
)  # fmt: skip
IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))


def sae_at(hookpoint: str, k: int = 3, n: int = 24, dtype: torch.dtype = torch.float32) -> SAE:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64)
    W = (W / W.norm(dim=-1, keepdim=True)).to(dtype)
    b = 0.1 * torch.randn(HIDDEN, generator=generator).to(dtype)
    return SAE.from_weights(W, W.clone(), None, b, activation=TopK(k), hookpoint=hookpoint)


def expected(plain: Tensor, ablated: Tensor, ids: Tensor, position: int, horizon: int) -> dict:
    """One ablation's numbers from whole logits [tokens, vocabulary], in float64 with numpy."""
    stop = min(position + horizon, len(ids))
    z, new = plain[position:stop].double().numpy(), ablated[position:stop].double().numpy()
    delta = new - z
    v = delta - np.median(delta, axis=-1, keepdims=True)  # VOCAB is odd
    log_p, log_q = log_softmax(z, -1), log_softmax(new, -1)
    after = ids[position + 1 : stop + 1].numpy()
    t = np.arange(len(after))
    return {
        "sparsity": (np.abs(v).sum() / np.sqrt((v**2).sum())) ** 2 / v.size,
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "loss_change": log_p[t, after] - log_q[t, after],
        "moved": v.sum(0),
    }


def check(model: nn.Module, sae: SAE, found: AblationEffects, horizon: int, **splice: bool) -> None:
    """Every entry against `attach` with `ablate`, whose own tests compare it with plain tensors."""
    for i in range(0, len(found), max(1, len(found) // 3)):
        row, position, latent = (
            int(getattr(found, n)[i]) for n in ("rows", "positions", "latents")
        )
        ids = IDS[row : row + 1]
        with torch.no_grad(), attach(model, sae, **splice) as attachment:
            plain = model(ids, use_cache=False).logits[0]
            code = attachment.codes[sae.hookpoint][0, position]
            attachment.edits = ablate(latent, positions=position)
            ablated = model(ids, use_cache=False).logits[0]
        assert found.values[i] == pytest.approx(code.to_dense()[latent].item(), rel=1e-5)
        true = expected(plain, ablated, ids[0], position, horizon)
        assert found.sparsity[i] == pytest.approx(true["sparsity"], rel=1e-4)
        kl, loss = true["kl"], true["loss_change"]
        np.testing.assert_allclose(found.kl_by_token[i, : len(kl)], kl, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(found.loss_change_by_token[i, : len(loss)], loss, atol=1e-5)
        assert found.kl_by_token[i, len(kl) :].isnan().all()
        assert found.loss_change_by_token[i, len(loss) :].isnan().all()
        assert found.kl[i] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-7)
        if len(loss):
            assert found.loss_change[i] == pytest.approx(loss.mean(), abs=1e-5)
        order = true["moved"].argsort()
        np.testing.assert_allclose(  # compared by size: near ties may change places
            true["moved"][found.top_promoted[i]], true["moved"][order[:3]], atol=1e-5
        )
        np.testing.assert_allclose(
            true["moved"][found.top_suppressed[i]], true["moved"][order[::-1][:3]], atol=1e-5
        )


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mamba"])
def test_a_replay_equals_whole_passes_on_every_architecture(name: str) -> None:
    model = tiny(name)
    tested = 0
    for site in SITES:
        hookpoint = Hookpoint.parse(site)
        try:
            hookpoint.resolve(model)
        except HookpointError:
            continue
        if hookpoint.site == "embed" and name == "opt_post_norm":
            continue  # its embedding is narrower than the SAE
        tested += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = ablation_effects(
                model, sae_at(site), IDS, positions=[2, -2], horizon=5, top=3, progress=False
            )
        assert found.method == "replay" and len(found) == 2 * 2 * 3
        check(model, sae_at(site), found, 5)
    assert tested >= 4


def test_without_the_error_the_reconstruction_is_in_every_pass() -> None:
    for name, site in (
        ("gemma3_text", "resid_post.1"),
        ("gpt2", "mlp_out.1"),
        ("mamba", "resid_post.1"),
    ):
        model, sae = tiny(name), sae_at(site)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ablation_effects(
                model, sae, IDS, positions=slice(3, 9, 2), horizon=4, keep_error=False, top=3,
                progress=False,
            )  # fmt: skip
        assert found.positions.unique().tolist() == [3, 5, 7]
        check(model, sae, found, 4, splice=True)


def test_mamba_is_run_as_a_whole_and_says_so() -> None:
    model, sae = tiny("mamba"), sae_at("resid_post.1")
    with pytest.warns(UserWarning, match="cannot be replayed .* whole forward pass"):
        found = ablation_effects(model, sae, IDS, positions=4, horizon=3, top=3, progress=False)
    assert found.method == "brute force"
    check(model, sae, found, 3)


def test_a_model_whose_upper_blocks_look_past_the_stream_is_run_as_a_whole() -> None:
    """As Gemma 3n's shared keys: what an upper block reads from a lower one is missed by a replay,
    and the comparison with a whole pass has to notice."""
    model = tiny("gpt2")
    first: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, output: Tensor) -> None:
        first[:] = [output]

    def read(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + torch.tanh(first[0][:, : output.shape[1]])

    model.transformer.h[0].register_forward_hook(keep)
    model.transformer.h[2].register_forward_hook(read)
    with pytest.warns(UserWarning, match="cannot be replayed"):
        run = choose_runner(model, Hookpoint.parse("resid_post.1"), IDS)
    assert isinstance(run, BruteForce)
    short = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    short["attention_mask"][0, 1:] = 0  # a row of one token, where both come to the same
    with pytest.warns(UserWarning, match="cannot be replayed"):
        sae = sae_at("resid_post.1")
        assert ablation_effects(model, sae, short, progress=False).method == "brute force"


@pytest.mark.parametrize("when", ["several tokens", "one place"])
def test_a_user_hook_that_a_replay_would_run_otherwise_is_noticed(when: str) -> None:
    model, sae = tiny("gpt2"), sae_at("resid_post.0")
    push = torch.linspace(-1, 2, HIDDEN)

    def steer(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if when == "several tokens":
            return output + push if output.shape[1] > 1 else output
        return torch.cat([output[:, :1] + push, output[:, 1:]], 1)

    model.transformer.h[2].register_forward_hook(steer)
    with pytest.warns(UserWarning, match="cannot be replayed"):
        found = ablation_effects(model, sae, IDS, positions=-1, top=3, progress=False)
    check(model, sae, found, 16)


def test_positions_that_depend_on_the_length_of_the_row() -> None:
    """Dynamic RoPE scales with the row, so neither a replay nor a shortened row will do."""
    from tiny_models import HEAD8, build

    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    model = build("Llama", **HEAD8 | dict(max_position_embeddings=6, rope_parameters=rope))
    sae = sae_at("resid_post.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ablation_effects(
            model, sae, IDS, positions=[0, 3], horizon=3, top=3, progress=False
        )
    check(model, sae, found, 3)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_models_are_measured(how: str) -> None:
    sae = sae_at("resid_post.1")
    plain = ablation_effects(tiny("llama"), sae, IDS, positions=4, progress=False)
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "in place":
        model.compile(backend="eager")
    before = compiled(IDS, use_cache=False).logits
    found = ablation_effects(compiled, sae, IDS, positions=4, progress=False)
    torch.testing.assert_close(found.kl, plain.kl)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, before)


def test_large_changes_and_ruled_out_tokens_have_finite_effects() -> None:
    model = tiny("gpt2")
    ids = IDS[:1]
    big, ruled = torch.randn(2, VOCAB), torch.randn(2, VOCAB)
    from saert.measure.ablation.effects import effects

    big[1] = big[0] + 200 * torch.randn(VOCAB)
    ruled[:, 5] = -torch.inf
    for before, after in (big, ruled):
        found = effects(before[None], after[None, None], torch.tensor([3]), 2)
        log_p, log_q = (z.double().log_softmax(-1) for z in (before, after))
        kl = (log_p.exp() * (log_p - log_q)).nan_to_num(0).sum()
        assert found.kl[0, 0] == pytest.approx(kl.item(), rel=1e-5)
        assert found.loss_change[0, 0] == pytest.approx((log_p[3] - log_q[3]).item(), rel=1e-4)
        assert found.sparsity.isfinite().all()
    after = ruled[0].clone()
    after[7] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        effects(ruled[:1], after[None, None], torch.tensor([3]), 2)
    hook = model.lm_head.register_forward_hook(lambda m, a, z: z.fill_(torch.nan))
    with pytest.raises(ValueError, match="are NaN after a change"):
        ablation_effects(model, sae_at("resid_post.1"), ids, progress=False)
    hook.remove()


def test_the_base_pass_makes_no_logits() -> None:
    """Logits of a long row and a large vocabulary would not fit."""
    model, seen = tiny("gpt2"), []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:2].numel()))
    ablation_effects(
        model, sae_at("resid_post.1", k=2), IDS[:1].repeat(1, 9), positions=3, horizon=2,
        progress=False,
    )  # fmt: skip
    assert max(seen) <= 3 * 5


def test_offloaded_models() -> None:
    accelerate = pytest.importorskip("accelerate")
    sae = sae_at("resid_post.1")
    plain = ablation_effects(tiny("llama"), sae, IDS, positions=4, progress=False)
    model = accelerate.cpu_offload(tiny("llama"), torch.device("cpu"))
    found = ablation_effects(model, sae, IDS, positions=4, progress=False)
    assert found.method == "replay"
    torch.testing.assert_close(found.kl, plain.kl)


def test_special_tokens_are_not_ablated() -> None:
    model, sae, first = tiny("gpt2"), sae_at("resid_post.1"), IDS[:, :1]
    mask = lambda ids: ids == first[0]  # noqa: E731
    found = ablation_effects(model, sae, IDS, special=mask, horizon=2, progress=False)
    assert not mask(IDS)[found.rows, found.positions].any() and len(found) == 3 * int(
        (~mask(IDS)).sum()
    )
    other = direction_effects(
        model, "resid_post.1", IDS, "random:2", special=mask, horizon=2, progress=False
    )
    assert len(other) == 2 * int((~mask(IDS)).sum())


@pytest.mark.parametrize("kind", ["transcoder_square", "sae_skip"])
@pytest.mark.parametrize("transform", ["layer_norm", "dataset_scale"])
@pytest.mark.parametrize("act", ["jumprelu", "gated"])
def test_every_kind_of_sae(kind: str, transform: str, act: str) -> None:
    model = tiny("llama").double()
    at = "mlp_in.0" if kind.startswith("transcoder") else "resid_post.0"
    sae = make(act, transform, kind, d_in=HIDDEN, hookpoint=at)
    found = ablation_effects(model, sae, IDS, positions=[4], horizon=4, top=3, progress=False)
    check(model, sae, found, 4)


def test_padding_is_left_out_and_rows_of_all_lengths_keep_their_places() -> None:
    model, sae = tiny("llama"), sae_at("resid_post.1")
    ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    spans = [slice(3, 11), slice(0, 6), slice(0, 8)]
    for row, span in enumerate(spans):
        ids[row, span] = IDS[row % 2, : span.stop - span.start]
        mask[row, span] = 1
    together = ablation_effects(
        model, sae, {"input_ids": ids, "attention_mask": mask}, horizon=4, progress=False
    )
    for row, span in enumerate(spans):
        alone = ablation_effects(model, sae, ids[row : row + 1, span], horizon=4, progress=False)
        ours = together[together.rows == row]
        for name in COLUMNS:
            if name != "rows":
                a, b = getattr(ours, name), getattr(alone, name)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_chosen_latents_and_batch_sizes() -> None:
    model, sae = tiny("gpt2"), sae_at("resid_post.1", k=6)
    every = ablation_effects(model, sae, IDS, horizon=3, progress=False)
    code = sae.encode(_hidden(model, "resid_post.1"))
    assert len(every) == int((code.values != 0).sum())
    chosen = every.latents.unique()[:2]
    some = ablation_effects(
        model, sae, IDS, latents=chosen, horizon=3, batch_size=1, progress=False
    )
    expected = every[torch.isin(every.latents, chosen)]
    for name in COLUMNS:
        a, b = getattr(some, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    keys = list(zip(every.rows.tolist(), every.positions.tolist(), strict=True))
    assert keys == sorted(keys)


def test_attributed_takes_the_largest_of_each_row() -> None:
    from saert.measure.attribution.attribute import attribute
    from saert.measure.attribution.metric import next_token_loss

    model, sae = tiny("gpt2"), sae_at("resid_post.1")
    found = ablation_effects(
        model, sae, IDS, latents="attributed:4", positions=slice(2, 9), horizon=3, progress=False
    )
    scores = attribute(model, sae, IDS, next_token_loss(IDS), progress=False)["resid_post.1"]
    for row in range(2):
        dense = scores.to_dense()[row, 2:9].abs()
        best = dense.flatten().topk(4).indices
        wanted = {(2 + int(i) // sae.num_latents, int(i) % sae.num_latents) for i in best}
        ours = found[found.rows == row]
        assert wanted == set(zip(ours.positions.tolist(), ours.latents.tolist(), strict=True))


def test_directions_and_channels() -> None:
    model = tiny("gpt2")
    x = _hidden(model, "resid_post.1")
    found = direction_effects(
        model, "resid_post.1", IDS, positions=[3, 6], horizon=4, top=3, progress=False
    )
    assert len(found) == 2 * 2 * HIDDEN
    few = direction_effects(
        model, "resid_post.1", IDS, "channels:5", positions=[6], horizon=4, progress=False
    )
    assert len(few.latents.unique()) == 5
    twice = torch.tensor([6, 6, -5])
    again = direction_effects(
        model, "resid_post.1", IDS, "channels:5", positions=twice, horizon=4, progress=False
    )
    torch.testing.assert_close(again.kl, few.kl)
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(3, HIDDEN, generator=generator)
    given = direction_effects(
        model, "resid_post.1", IDS, u * 7, positions=[6], horizon=4, top=3, progress=False
    )
    unit = u / u.norm(dim=-1, keepdim=True)
    for table, direction in ((found, torch.eye(HIDDEN)), (few, torch.eye(HIDDEN)), (given, unit)):
        for i in range(0, len(table), 5):
            row, position = int(table.rows[i]), int(table.positions[i])
            along = direction[table.latents[i]]
            new = x[row, position] - (x[row, position] @ along) * along
            true = expected(*_with(model, row, position, new), IDS[row], position, 4)
            assert table.values[i] == pytest.approx((x[row, position] @ along).item(), rel=1e-4)
            assert table.sparsity[i] == pytest.approx(true["sparsity"], rel=1e-3)
            assert table.kl[i] == pytest.approx(true["kl"].mean(), rel=1e-3, abs=1e-7)
    again = direction_effects(model, "resid_post.1", IDS, "random:2", positions=[6], progress=False)
    other = direction_effects(
        model, "resid_post.1", IDS, "random:2", positions=[6], seed=1, progress=False
    )
    assert not torch.equal(again.values, other.values)


def _hidden(model: nn.Module, at: str) -> Tensor:
    from saert.capture import capture

    hookpoint = Hookpoint.parse(at)
    return capture(model, IDS, [hookpoint])[hookpoint].view(*IDS.shape, -1)


def _with(model: nn.Module, row: int, position: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a row as they are, and with another output of block 1 at one token."""

    def replace(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, position] = new
        return output

    with torch.no_grad():
        plain = model(IDS[row : row + 1]).logits[0]
        handle = model.transformer.h[1].register_forward_hook(replace)
        changed = model(IDS[row : row + 1]).logits[0]
        handle.remove()
    return plain, changed


def test_bfloat16() -> None:
    model, sae = tiny("llama").bfloat16(), sae_at("resid_post.1")
    run = choose_runner(model, Hookpoint.parse("resid_post.1"), IDS)
    assert isinstance(run, Replay)
    same = run.logits(torch.zeros(2, dtype=torch.int64), 5, torch.zeros(2, HIDDEN), 4)
    assert torch.equal(same[0], same[1])  # so that no change has no effect
    found = ablation_effects(model, sae, IDS, positions=[5], horizon=4, progress=False)
    wide = ablation_effects(model.float(), sae, IDS, positions=[5], horizon=4, progress=False)
    assert (found.kl / wide.kl).log().abs().median() < 0.5


def test_a_latent_that_writes_nothing_changes_nothing() -> None:
    model, sae = tiny("gpt2"), sae_at("resid_post.1")
    before = ablation_effects(model, sae, IDS, positions=5, progress=False)
    sae.W_dec[before.latents[0]] = 0
    after = ablation_effects(model, sae, IDS, positions=5, progress=False)[0]
    assert after.kl == 0 and after.loss_change == 0 and after.sparsity.isnan()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt2")
    blocks, plain = list(model.transformer.h), model(IDS).logits
    sae = sae_at("resid_post.1")
    ablation_effects(model, sae, IDS, positions=3, progress=False)
    run = Replay(model, Hookpoint.parse("resid_post.1"), IDS)
    with pytest.raises(IndexError):
        run.logits(torch.tensor([9]), 2, torch.zeros(1, HIDDEN), 3)
    assert all(a is b for a, b in zip(blocks, model.transformer.h, strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(IDS).logits, plain)


def test_peft_wrapped() -> None:
    pytest.importorskip("peft")
    model, sae = peft_wrap(tiny("llama")), sae_at("resid_post.1")
    found = ablation_effects(model, sae, IDS, positions=[4], horizon=4, top=3, progress=False)
    assert found.method == "replay"
    check(model, sae, found, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(latents="most"), "expected \"active\""),
        (dict(latents="attributed:0"), "expected \"active\""),
        (dict(latents=[24]), "found 24 to 24, expected 0 to 23"),
        (dict(latents=[]), "at least one"),
        (dict(latents=1.5), "at least one"),
        (dict(positions=11), "position 11|11 is outside a row of 11"),
        (dict(horizon=0), "horizon is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(top=0), "top is 0"),
    ],
)  # fmt: skip
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ablation_effects(tiny("gpt2"), sae_at("resid_post.1"), IDS, progress=False, **options)


def test_refuses_models_that_would_give_other_numbers() -> None:
    model, sae = tiny("gpt2"), sae_at("resid_post.1")
    with attach(model, sae), pytest.raises(ValueError, match="SAEs attached"):
        ablation_effects(model, sae, IDS, progress=False)
    with pytest.raises(ValueError, match="training mode"):
        ablation_effects(model.train(), sae, IDS, progress=False)
    sae.hookpoint = None
    with pytest.raises(ValueError, match="where it reads"):
        ablation_effects(model.eval(), sae, IDS, progress=False)
    for directions in ("channels:40", "rows", "random:0", torch.zeros(2, HIDDEN), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="directions"):
            direction_effects(model, "resid_post.1", IDS, directions, progress=False)


def test_nothing_active_is_an_error() -> None:
    model, sae = tiny("gpt2"), sae_at("resid_post.1")
    quiet = [i for i in range(24) if i not in _active(model, sae)]
    with pytest.raises(ValueError, match="no such latent is active"):
        ablation_effects(model, sae, IDS, latents=quiet[0], positions=0, progress=False)


def _active(model: nn.Module, sae: SAE) -> set[int]:
    code = sae.encode(_hidden(model, "resid_post.1")[:, 0])
    return set(code.indices[code.values != 0].tolist())


def test_the_table(tmp_path) -> None:
    model, sae = tiny("gpt2"), sae_at("resid_post.1")
    found = ablation_effects(model, sae, IDS, horizon=4, progress=False)
    found.save(tmp_path / "effects.safetensors")
    again = AblationEffects.load(tmp_path / "effects.safetensors")
    for name in COLUMNS:
        torch.testing.assert_close(
            getattr(found, name), getattr(again, name), rtol=0, atol=0, equal_nan=True
        )
    assert again.method == "replay" and len(again[3:7]) == 4 and len(again[-1]) == 1
    assert [int(one.latents) for one in found] == found.latents.tolist()
    assert torch.equal(found[torch.tensor(2)].kl, found.kl[2:3])
    assert len(found[np.int64(1)]) == 1 and len(found[[0, 2]]) == 2
    with pytest.raises(IndexError):
        found[len(found)]
    assert not len(AblationEffects.cat([AblationEffects.empty(4, 10), found[:0]]))
    kl = found.sort().kl
    assert (kl[:-1] >= kl[1:]).all()
    loss = found.sort("loss_change", descending=False).loss_change
    defined = loss[~loss.isnan()]
    assert loss[: len(defined)].isfinite().all() and (defined[:-1] <= defined[1:]).all()
    assert len(loss) - len(defined) > 0  # last tokens, which come last
    with pytest.raises(ValueError, match="expected one of rows, positions"):
        found.sort("kl_by_token")
    assert f"{len(found)} ablations by replay" in repr(found)
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert list(frame.columns) == list(COLUMNS) and len(frame) == len(found)
    both = AblationEffects.cat([found[:2], found[2:]])
    assert torch.equal(both.kl, found.kl)
    (tmp_path / "other").write_bytes((tmp_path / "effects.safetensors").read_bytes()[:50])
    with pytest.raises(Exception):  # noqa: B017  safetensors' own error
        AblationEffects.load(tmp_path / "other")
