"""Captured activations: what transformers itself returns, and no more of the model than needed."""

import pytest
import torch
from tiny_models import FALCON, VOCAB, build, tiny

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hooks import hooked
from saert.train.downstream import gradients


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


def some_rows(count=4, context=16):
    return torch.randint(3, VOCAB, (count, context), generator=torch.Generator().manual_seed(0))


def test_capture_reads_what_transformers_returns(model):
    rows, hookpoint = some_rows(), Hookpoint.parse("resid_post.0")
    states = model(rows, output_hidden_states=True).hidden_states
    assert torch.equal(
        capture(model, rows, [hookpoint], batch=3)[hookpoint], states[1].flatten(0, 1)
    )


def test_a_model_that_adds_in_place_is_captured_as_it_was():
    """Falcon adds attention's output to the MLP's tensor after the hook has seen it."""
    model = build("Falcon", **(FALCON | dict(parallel_attn=True, new_decoder_architecture=False)))
    rows, site = some_rows(), Hookpoint.parse("mlp_out.1")
    seen = []
    with hooked(model, site, lambda state: seen.append(state.clone())):
        model(rows)
    expected = seen[0].flatten(0, -2)
    assert torch.equal(capture(model, rows, [site])[site], expected)
    x, _ = gradients(model, rows, [site])[site]
    torch.testing.assert_close(x, expected)


def test_capture_runs_no_further_than_it_has_to(model):
    calls = []
    handle = model.transformer.h[2].register_forward_hook(lambda *_: calls.append(1))
    capture(model, some_rows(), [Hookpoint.parse("resid_post.1"), Hookpoint.parse("mlp_in.0")])
    assert not calls
    capture(model, some_rows(), [Hookpoint.parse("resid_post.2")])
    assert calls
    handle.remove()


def test_hooks_leave_nothing_behind(model):
    rows = some_rows()
    before = model(rows).logits
    with hooked(model, Hookpoint.parse("resid_post.0"), torch.zeros_like):
        assert not torch.equal(model(rows).logits, before)
    assert torch.equal(model(rows).logits, before)
