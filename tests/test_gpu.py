"""The runtime on a CUDA device: the SAE follows the hidden state; numbers agree with the CPU."""

import copy

import pytest
import torch
from test_attach import ACTIVATIONS, IDS, logits, make_sae
from tiny_models import tiny

from saert import add, attach, clamp, scale

pytestmark = pytest.mark.gpu
EDITS = [add(3, 2.0), clamp(5, 1.0, positions=slice(2, None)), scale(7, 2.0, rows=1)]


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sae_follows_the_model_to_the_device(activation, splice):
    model = tiny("llama")
    with attach(model, make_sae(activation=activation), EDITS, splice=splice):
        expected = logits(model)
    there, sae = copy.deepcopy(model).cuda(), make_sae(activation=activation)
    before = logits(there, ids=IDS.cuda())
    with attach(there, sae, EDITS, splice=splice) as attachment:
        found = logits(there, ids=IDS.cuda())
        code = attachment.codes["resid_post.1"]
        assert sae.device.type == code.values.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
        assert attachment.report()["resid_post.1"].milliseconds > 0
    assert torch.equal(logits(there, ids=IDS.cuda()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_edits_logits_are_bit_identical_on_the_device(dtype):
    model = copy.deepcopy(tiny("llama")).to("cuda", dtype)
    before = logits(model, ids=IDS.cuda())
    with attach(model, make_sae()):
        assert torch.equal(logits(model, ids=IDS.cuda()), before)


def test_timings_in_flight_stay_bounded():
    model = copy.deepcopy(tiny("gpt2")).cuda()
    with attach(model, make_sae(), record=False) as attachment:
        for _ in range(600):
            logits(model, ids=IDS.cuda())
        torch.cuda.synchronize()
        logits(model, ids=IDS.cuda())
        (tap,) = attachment._taps
        assert len(tap.recorder._events) <= 257
