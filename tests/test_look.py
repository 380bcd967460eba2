"""One text through an SAE, against the dense activations of the same text."""

import pytest
import torch
from sae_cases import make
from tiny_models import HIDDEN, tiny

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.measure.features import direction, look
from saert.measure.features.look import check_latent

IDS = torch.arange(5, 16)


@pytest.fixture(scope="module", params=["relu", "jumprelu", "topk", "abstopk"])
def case(request):
    model = tiny("llama")
    sae = make(request.param, d_in=HIDDEN, n=40, dtype=torch.float32, hookpoint="resid_post.1")
    place = Hookpoint.parse("resid_post.1")
    dense = sae.encode(capture(model, IDS[None], (place,), batch=1)[place]).to_dense()
    return sae, look(model, sae, IDS), dense


def test_a_look_is_the_dense_activations(case):
    sae, seen, dense = case
    for latent in range(0, 40, 7):
        assert torch.equal(seen.of(latent), dense[:, latent])
    torch.testing.assert_close(seen.totals, dense.abs().sum(-1))
    assert torch.equal(seen.l0, (dense != 0).sum(-1))
    order = [(int(i), float(dense[3, i])) for i in dense[3].abs().argsort(descending=True)]
    assert seen.at(3) == [one for one in order if one[1]]


def test_a_latent_that_does_not_exist(case):
    sae, seen, _ = case
    for wrong in (-1, 40):
        for ask in (
            lambda wrong=wrong: seen.of(wrong),
            lambda wrong=wrong: direction(tiny("llama"), None, sae, wrong),
            lambda wrong=wrong: check_latent(wrong, 40),
        ):
            with pytest.raises(ValueError, match=f"latent {wrong}: the SAE has 0 to 39"):
                ask()


def test_special_tokens_are_left_out(case):
    sae, seen, dense = case
    some = look(tiny("llama"), sae, IDS, lambda rows: rows == 7)
    assert some.used.tolist() == [one != 7 for one in IDS.tolist()] and some.l0[2] == 0
    assert torch.equal(some.totals[3:], seen.totals[3:])
