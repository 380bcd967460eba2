"""An SAE in shards is the whole SAE: the same codes, the same edits, the same text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sae_cases import ACTIVATIONS, KINDS, RANKED, TRANSFORMS, inputs, make
from test_attach import HIDDEN, IDS, make_sae
from tiny_models import tiny
from torch import nn

from saert import (
    SAE,
    MatchingPursuit,
    ReLU,
    TopK,
    ablate,
    ablation_effects,
    active,
    add,
    add_vector,
    attach,
    clamp,
    refine,
    save,
    scale,
    shard,
    together,
)

CASES = [
    *((act, "none", "sae") for act in ACTIVATIONS + RANKED),
    *(("topk", transform, "sae") for transform in TRANSFORMS),
    *((act, "layer_norm", kind) for kind in KINDS for act in ("topk", "jumprelu")),
]
CASES = list(dict.fromkeys(CASES))
EDITS = [
    add(3, 3.0),
    clamp(40, 1.5, positions=slice(1, None)),
    scale(17, -2.0, when=active(30)),
    ablate([8, 9, 31], rows=0),
    add(17, 0.5, phase="generated"),
    add_vector(torch.linspace(-1, 1, HIDDEN), 0.3),
]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def on_cpu(sae, shards=3):
    return shard(sae, devices=["cpu"] * shards)


def assert_same_code(found, expected, close=1e-5):
    """The same latents in the same slots; which one an unused slot names means nothing."""
    used = expected.values != 0
    assert found.shape == expected.shape and found.num_latents == expected.num_latents
    assert found.values.dtype == expected.values.dtype
    assert torch.equal(found.values != 0, used)
    assert torch.equal(found.indices.where(used, 0), expected.indices.where(used, 0))
    torch.testing.assert_close(found.values, expected.values, atol=close, rtol=close)


def seen(model, attachment):
    """Everything that a model with EDITS shows: logits, code, report, greedy tokens."""
    with torch.no_grad():
        logits = model(IDS).logits
    code = attachment.codes["resid_post.1"].to_dense()
    report = attachment.report()["resid_post.1"]
    tokens = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=5,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return logits, code, torch.tensor([report.tokens, report.l0, report.fvu]), tokens


def assert_same_seen(found, expected):
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[3], expected[3])


def overflowing():
    """Four latents, the last of which has a NaN for a score where x[0] = x[1] is large."""
    W = torch.eye(4)
    W[3] = torch.tensor([3e38, -3e38, 0, 0])
    return SAE.from_weights(W, torch.eye(4), activation=TopK(2))


# -- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("act", "transform", "kind"), CASES)
def test_a_sharded_sae_is_the_whole_one(act, transform, kind, dtype):
    sae = make(act, transform, kind, dtype=dtype)
    x, close = inputs(3, 4, dtype=dtype), dict(atol=CLOSE[dtype], rtol=CLOSE[dtype])
    per_token = torch.randint(sae.num_latents, (3, 4, 6))
    for shards in (1, 3) if act == "groupmax" else (2, 3, 7):  # 7: fewer latents than k in one
        found = on_cpu(sae, shards)
        code = found.encode(x)
        assert_same_code(code, sae.encode(x), CLOSE[dtype])
        torch.testing.assert_close(found.decode(code, x), sae.decode(code, x), **close)
        torch.testing.assert_close(found(x), sae(x), **close)
        torch.testing.assert_close(found.activations(x), sae.activations(x), **close)
        torch.testing.assert_close(found.pre_activations(x), sae.pre_activations(x), **close)
        for latents in (torch.tensor([2, 20, 9, 2]), per_token):
            for ask in ("activations", "pre_activations"):
                mine, theirs = (getattr(one, ask)(x, latents) for one in (found, sae))
                torch.testing.assert_close(mine, theirs, **close)
            values = torch.randn(3, 4, latents.shape[-1], dtype=code.values.dtype)
            base = torch.randn(3, 4, sae.d_out, dtype=dtype)
            for start in (None, base):
                mine, theirs = (one.written(latents, values, start) for one in (found, sae))
                torch.testing.assert_close(mine, theirs, **close)
            assert torch.equal(found.directions(latents), sae.W_dec[latents])
        assert_same_code(found.encode(x[0, 0]), sae.encode(x[0, 0]), CLOSE[dtype])
        difference = torch.randn(3, 4, sae.d_out, dtype=code.values.dtype)
        assert torch.equal(found.rescale(difference, x), sae.rescale(difference, x))


@pytest.mark.parametrize("act", ["topk", "abstopk", "groupmax", "jumprelu"])
def test_selection_by_decoder_norm(act):
    sae = make(act, select_by_decoder_norm=True)
    x = inputs(40)
    assert not torch.equal(sae.encode(x).indices, make(act).encode(x).indices)
    assert_same_code(on_cpu(sae).encode(x), sae.encode(x))


def test_a_half_precision_input():
    sae, x = make("topk", dtype=torch.bfloat16), inputs(30).bfloat16()
    assert_same_code(on_cpu(sae).encode(x), sae.encode(x))


@pytest.mark.parametrize("activation", [TopK(7), ReLU()])
def test_ties_across_shards_go_to_the_lowest_latent(activation):
    # small whole numbers: no product is rounded, so ties are ties to the bit
    generator = torch.Generator().manual_seed(0)
    W = torch.randint(-1, 2, (6, 5), generator=generator).float().repeat(5, 1)
    sae = SAE.from_weights(W, W, activation=activation)
    x = torch.randint(-2, 3, (200, 5), generator=generator).float()
    expected = sae.encode(x)
    assert (expected.values[:, 1:] == expected.values[:, :-1]).any(-1).float().mean() > 0.9
    for shards in (2, 4, 7):
        found = on_cpu(sae, shards).encode(x)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values)


def test_the_selection_is_that_of_the_dictionary_not_of_each_shard():
    """All that is large is in one shard, and what the others offer is none of the k largest."""
    b_enc = torch.arange(12.0).flip(0)
    sae = SAE.from_weights(torch.zeros(12, 4), torch.ones(12, 4), b_enc, activation=TopK(4))
    code = on_cpu(sae).encode(torch.zeros(2, 4))
    assert code.indices.tolist() == [[0, 1, 2, 3]] * 2
    assert code.values.tolist() == [[11.0, 10.0, 9.0, 8.0]] * 2


@pytest.mark.parametrize("act", ACTIVATIONS + RANKED)
def test_no_tokens(act):
    sae = make(act)
    x = inputs(2, 3)[:, :0]
    assert on_cpu(sae).encode(x).shape == sae.encode(x).shape
    assert on_cpu(sae)(x).shape == (2, 0, sae.d_out)


def test_nothing_fires():
    sae = make("jumprelu_scalar", kind="sae_plain")
    sae.activation.threshold += 100
    code = on_cpu(sae).encode(inputs(3))
    assert code.shape == (3, 1) and not code.values.any() and not code.indices.any()


@pytest.mark.parametrize("act", ["topk", "relu", "gated", "abstopk"])
def test_nan_is_reported_as_by_the_whole_sae(act):
    sae, x = make(act), inputs(3, 4)
    x[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 12 tokens are NaN") as expected:
        sae.encode(x)
    with pytest.raises(ValueError, match=r"first at token \[1, 2\]") as found:
        on_cpu(sae).encode(x)
    assert str(found.value) == str(expected.value)


def test_nan_in_the_scores_of_one_shard():
    x = torch.tensor([[1.0, 2, 3, 4], [10.0, 10, 1, 1]])
    with pytest.raises(ValueError, match=r"1 of 2 tokens are NaN, first at token \[1\]"):
        on_cpu(overflowing(), 2).encode(x)


def test_a_shard_holds_its_rows_and_nothing_else():
    sae = make("jumprelu", n=25, d_in=64, dtype=torch.float32)
    found = on_cpu(sae, 4)
    sizes = [one.W_enc.shape[0] for one in found.shards]
    assert sizes == [7, 6, 6, 6]
    for one, n in zip(found.shards, sizes, strict=True):
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (*one.parameters(), *one.buffers())}  # fmt: skip
        rows, b_dec = n * (64 + 64 + 1 + 1), 64  # W_enc, W_dec, b_enc, threshold
        assert sum(kept.values()) == 4 * (rows + b_dec)
        for name in ("W_enc", "W_dec", "b_enc"):
            assert getattr(one, name).data_ptr() != getattr(sae, name).data_ptr()
    turned = SAE.from_weights(torch.randn(16, 24).T, torch.randn(24, 16), activation=ReLU())
    assert on_cpu(turned).shards[1].W_enc.untyped_storage().nbytes() == 4 * 8 * 16
    with torch.no_grad():
        sae.W_dec.zero_()  # and is not the whole SAE's
    assert found.directions(torch.tensor([24])).any()


def test_gradients_reach_hidden_states_and_amounts_over_devices():
    sae, amount = make("topk"), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    latents, x = torch.tensor([[1, 22]]).expand(4, 2), inputs(4)

    def gradients(one):
        given = x.clone().requires_grad_()
        code = one.encode(given)
        y = one.decode(code, given)
        y = one.written(latents, amount.expand(4, 2) * code.values[:, :2], base=y)
        return torch.autograd.grad(y.square().sum(), (given, amount))

    for mine, theirs in zip(gradients(on_cpu(sae)), gradients(sae), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_repr_says_who_has_what():
    text = repr(on_cpu(make("topk"), 5))
    assert "num_latents=24" in text and "latents 0…4 on cpu" in text and "20…23 on cpu" in text


# -- on a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "gated"])
def test_attached_it_does_what_the_whole_sae_does(activation, splice):
    model, sae = tiny("llama"), make_sae(activation=activation)
    sharded = on_cpu(sae, 5)
    with attach(model, sae, EDITS, splice=splice) as attachment:
        expected = seen(model, attachment)
    with attach(model, sharded, EDITS, splice=splice) as attachment:
        assert_same_seen(seen(model, attachment), expected)
        attachment.codes[sharded]
        attachment.edits = add(3, 1.0, sae=sharded)


def test_a_plain_add_is_that_of_the_whole_sae_to_the_bit():
    model, sae = tiny("gpt2"), make_sae()
    found = []
    for one in (sae, on_cpu(sae)):
        with torch.no_grad(), attach(model, one, [add(3, 2.5), add(40, -1.0)], record=False):
            found.append(model(IDS).logits)
    assert torch.equal(*found)


def test_a_transcoder():
    model = tiny("gpt2")
    sae = make_sae("mlp_in.1", "relu", target_hookpoint="mlp_out.1")
    logits = []
    for one in (sae, on_cpu(sae)):
        edits = [scale(5, 3.0), add(40, 2.0)]
        with torch.no_grad(), attach(model, one, edits, splice=True) as attachment:
            logits.append(model(IDS).logits)
            assert attachment.report()["mlp_in.1"].l0 > 0
    torch.testing.assert_close(*logits)


@pytest.mark.slow
def test_torch_compile_goes_around_it():
    model, sharded = tiny("gpt2"), on_cpu(make_sae())
    with torch.no_grad(), attach(model, sharded, EDITS, record=False):
        expected = model(IDS).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(IDS).logits, expected)
    torch.compiler.reset()


def test_ablation_effects_read_the_shards():
    model, sae = tiny("gpt2"), make_sae()
    tables = [ablation_effects(model, one, IDS, positions=2, progress=False) for one in
              (sae, on_cpu(sae))]  # fmt: skip
    assert torch.equal(tables[0].latents, tables[1].latents)
    torch.testing.assert_close(tables[0].kl, tables[1].kl, atol=1e-5, rtol=1e-4)


# -- what is refused -------------------------------------------------------------------------------


def test_what_needs_the_whole_dictionary_says_so(tmp_path):
    sae = on_cpu(make("topk"))
    for act in (
        lambda: sae.W_dec,
        lambda: sae.W_enc,
        lambda: sae.train(),
        lambda: sae.requires_grad_(),
        lambda: sae.state_dict(),
        lambda: sae.half(),
        lambda: save(sae, tmp_path / "sae"),
        lambda: refine(sae, inputs(2)),
        lambda: shard(sae, devices=["cpu"]),
    ):
        with pytest.raises(ValueError, match="sharded"):
            act()
    with pytest.raises(ValueError, match=r"float64.*cannot become torch\.float32"):
        sae.to(torch.float32)
    assert sae.to("cpu", torch.float64) is sae and sae.eval() is sae
    for latent in (-1, 24):
        with pytest.raises(IndexError, match="expected 0 to 23"):
            sae.directions(torch.tensor([latent]))


def test_what_an_attachment_refuses():
    model, sae = tiny("gpt2"), on_cpu(make_sae())
    with pytest.raises(ValueError, match="compiled=True needs a whole SAE"):
        attach(model, sae, compiled=True)
    with pytest.raises(ValueError, match="refine needs a whole SAE"):
        attach(model, sae, refine=True)


class Other(TopK):
    """A TopK that somebody changed."""


def test_what_shard_refuses():
    sae = make("topk")
    with pytest.raises(ValueError, match="either devices= or group="):
        shard(sae)
    with pytest.raises(ValueError, match="no devices"):
        shard(sae, devices=[])
    with pytest.raises(ValueError, match="25 shards for 24 latents"):
        on_cpu(sae, 25)
    with pytest.raises(ValueError, match="5 shards for 4 groups"):
        on_cpu(make("groupmax"), 5)
    with pytest.raises(TypeError, match="load"):
        shard("bundled:resid_post.2", devices=["cpu"])
    for activation in (MatchingPursuit(), Other(3)):
        other = SAE.from_weights(torch.eye(8), torch.eye(8), activation=activation)
        with pytest.raises(ValueError, match=f"{type(activation).__name__} cannot be sharded"):
            on_cpu(other)


# -- several processes -----------------------------------------------------------------------------


def request(*tensors, what="encode"):
    here = torch.device("cpu")
    return together.facts(here, together.described(here, what, *tensors), *tensors)


def alike(*xs):
    """What processes with these inputs find, whichever of them is the first."""
    first, last = (together.same(torch.stack([*map(request, each)])) for each in (xs, xs[::-1]))
    assert first == last
    return first


def test_processes_with_other_text_are_told_apart():
    x, y = (nn.functional.rms_norm(torch.randn(1024, 512), [512]) for _ in "xy")
    apart = (x.abs().mean() / y.abs().mean() - 1).abs()
    assert apart < together.ALIKE  # so that it is the entries that tell
    assert not alike(x, y) and not alike(x, x, y)
    assert not alike(x[:63], x[:63].roll(1, 0)) and not alike(x[:1], y[:1])
    assert not alike(x, x.bfloat16()) and not alike(x, x[:512].repeat(2, 1))
    for zeros in (0.0, 0.5):  # what a ReLU leaves
        x = x.where(torch.rand_like(x) > zeros, 0)
        noise = 0.01 * torch.randn_like(x) * x
        assert alike(x, x + noise) and alike(x.bfloat16(), (x + noise).bfloat16())
    massive = x.index_fill(1, torch.tensor([7]), 300.0)  # bfloat16 rounds it to a multiple of 2
    assert alike(massive.bfloat16(), (massive * 1.0005).bfloat16(), massive.bfloat16())
    assert alike(x[:0], x[:0]) and alike(x[0, :1], x[0, :1])


def test_nan_and_inf_are_no_difference_where_all_have_them():
    x = torch.randn(64, 16)
    for value in (torch.nan, torch.inf):
        bad = x.index_fill(0, torch.arange(0, 64, 5), value)
        assert alike(bad, bad) and not alike(x, bad)
        assert not alike(bad, bad.roll(1, 1).roll(5, 0))  # as many of them, at the same places


def test_latents_are_compared_exactly():
    for other in ([0, 1], [4, -1], [0, 2], [2, 0, 0]):
        assert not alike(torch.tensor([2, 0]), torch.tensor(other))
    assert alike(*[torch.tensor([2, 0])] * 3)


def test_what_would_fail_in_one_process_is_compared():
    x, here = torch.ones(2, 3), torch.device("cpu")
    assert together.described(here, "encode", x) == "encode torch.float32 [2, 3]"
    text = together.described(here, "encode", x.to("meta"), x.clone().requires_grad_())
    assert "[2, 3] on meta instead of cpu" in text and text.endswith("with gradient")


def test_a_group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sae, x = make("jumprelu"), inputs(3, 4)
        found = shard(sae, group=dist.group.WORLD)
        assert_same_code(found.encode(x), sae.encode(x))
        torch.testing.assert_close(found(x), sae(x))
        with pytest.raises(ValueError, match="no gradient passes between processes"):
            found.encode(x.requires_grad_())
        assert "process 0 of 1: latents 0…23" in repr(found)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_compute_what_one_does(processes, tmp_path):
    """Two share a tensor-parallel model as well; three have one each."""
    model = tiny("llama")
    arguments = [str(tmp_path)]
    if processes == 2:
        model.save_pretrained(tmp_path / "model")
        arguments.append(str(tmp_path / "model"))
    script = Path(__file__).parent / "sharded_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(processes), str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}", weights_only=False) for r in range(processes)]
    for case in CASES:
        sae, x = make(*case), inputs(3, 4)
        one = on_cpu(sae, processes)
        code = one.encode(x)
        for found in ranks:
            assert torch.equal(found[case][0], code.indices)  # and so those of the whole SAE
            dense, some = sae.activations(x), sae.activations(x, torch.tensor([2, 20, 9, 2]))
            wanted = (code.values, sae.decode(code, x), dense, some)
            for mine, theirs in zip(found[case][1:], wanted, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    for activation in ("topk", "jumprelu"):
        for splice in (False, True):
            sae = make_sae(activation=activation)
            with torch.no_grad(), attach(model, sae, EDITS, splice=splice) as attachment:
                expected = seen(model, attachment)
            for found in ranks:
                assert_same_seen(found[activation, splice], expected)
                for mine, theirs in zip(
                    found[activation, splice], ranks[0][activation, splice], strict=True
                ):
                    assert torch.equal(mine, theirs)
    for rank, found in enumerate(ranks):
        refused = found["refused"]
        assert "2 of 2 tokens are NaN" in refused.pop("NaN")
        assert "no gradient passes between processes" in refused.pop("gradient")
        assert "all must shard the same one" in refused.pop("sae")
        for text in refused.values():
            assert "do not ask for the same" in text
        torch.testing.assert_close(found["after"], make("topk").encode(inputs(3, 4)).to_dense())
        assert f"process {rank} of {processes}: latents" in found["repr"]


@pytest.mark.gpu
def test_shards_on_a_gpu_and_beside_it():
    sae, x = make("topk", dtype=torch.float32), inputs(30, dtype=torch.float32)
    for devices in (["cuda:0", "cuda:0"], ["cpu", "cuda:0"]):
        found = shard(sae, devices=devices).to("cuda")
        assert [str(one.device) for one in found.shards] == devices
        code = found.encode(x.cuda())
        assert code.values.is_cuda
        assert shard(make("jumprelu"), devices=devices).activation.threshold.device.type == (
            torch.device(devices[0]).type
        )
        assert_same_code(code.to("cpu"), sae.encode(x))
        y = found.decode(code, x.cuda()).cpu()
        torch.testing.assert_close(y, sae(x), atol=1e-5, rtol=1e-5)
