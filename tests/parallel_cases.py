"""What attach does to a model that two processes share, as functions from a model to tensors.

tests/test_parallel.py runs each on the whole model, tests/parallel_run.py in two processes.
"""

from contextlib import nullcontext, suppress

import torch
import torch.distributed as dist
from test_attach import IDS, logits, make_sae
from tiny_models import _MODELS, HIDDEN, INNER, build
from torch import nn

from saert import (
    Hookpoint,
    HookpointError,
    ablate,
    active,
    add,
    add_vector,
    attach,
    clamp,
    scale,
    twin,
)
from saert.capture import capture
from saert.measure import ablation_effects, attribute, next_token_loss

EDITS = (add(3, 2.0), scale(5, 2.0), ablate(7))
SITES = (
    "embed", "resid_pre.1", "resid_mid.1", "resid_post.1", "attn_out.1", "mlp_in.1", "mlp_out.1",
    "attn_z.1", "mlp_act.1",
)  # fmt: skip
GATE, DOWN = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"
QUERY = "model.layers.1.self_attn.q_proj:in"
OPERATIONS = {
    "add": add(3, 3.0),
    "clamp": clamp(4, 2.0),
    "scale": scale(5, 3.0),
    "ablate": ablate(range(20)),
    "vector": add_vector(torch.linspace(-1, 1, HIDDEN), 2.0),
    "when": add(3, 3.0, when=active(8)),
    "positions": add(3, 3.0, positions=[0, -1]),
    "prompt": clamp(4, 3.0, phase="prompt"),
    "generated": add(3, 4.0, phase="generated"),
    "rows": add(3, 4.0, rows=[1]),
}


def even(name):
    """A tiny model whose vocabulary two processes can share, as transformers 5.17 needs it."""
    stem, config = _MODELS[name]
    return build(stem, **config | {"vocab_size": 98})


def width(model, at):
    """Of the whole tensor, with the plain hidden size where the model does not say."""
    return Hookpoint.parse(at).resolve(model).width or HIDDEN


def there(model, places):
    """Those of the hookpoints that the model has."""
    found = []
    for at in places:
        with suppress(HookpointError):
            Hookpoint.parse(at).resolve(model)
            found.append(at)
    return found


def run(model, mask=None):
    """Logits of one pass, and greedy tokens."""
    mask = torch.ones_like(IDS) if mask is None else mask
    first = logits(model, attention_mask=mask)
    with torch.no_grad():
        tokens = model.generate(
            IDS, attention_mask=mask, do_sample=False, max_new_tokens=3, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return [first, tokens]


def edited(at, *edits, activation="topk", **options):
    def case(model):
        sae = make_sae(at, activation, width(model, at))
        with attach(model, sae, edits, record="all", **options) as attachment:
            found = run(model)
            found.append(attachment.codes[at].to_dense())
            found.append(torch.tensor(attachment.report()[str(Hookpoint.parse(at))].fvu))
        return [*found, logits(model)]  # and nothing is left

    return case


def several(model):
    places = there(model, SITES)
    saes = {at: make_sae(at, width=width(model, at), seed=i) for i, at in enumerate(places)}
    edits = [add(3, 1.0, sae=at) for at in places]
    with attach(model, saes, edits, splice=["attn_z.1", "resid_post.1"]) as attachment:
        return [*run(model), *(attachment.codes[at].to_dense() for at in places)]


def transcoder(model):
    sae = make_sae("mlp_in.1", target_hookpoint="mlp_out.1")
    with attach(model, sae, EDITS, splice=True) as attachment:
        return [*run(model), attachment.codes["mlp_in.1"].to_dense()]


def inner_transcoder(model):
    """From the attention's heads to the MLP's neurons, both split."""
    sae = make_sae("attn_z.1", width=width(model, "attn_z.1"), out=width(model, "mlp_act.1"),
                   target_hookpoint="mlp_act.1")  # fmt: skip
    with attach(model, sae, EDITS):
        return run(model)


def padded(model):
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    sae = make_sae("attn_z.1", width=width(model, "attn_z.1"))
    with attach(model, sae, [*EDITS, add(9, 2.0, positions=[1])], record="all") as attachment:
        return [*run(model, mask)[1:], attachment.codes["attn_z.1"].to_dense()]


def gradient(at):
    def case(model):
        amount = torch.tensor(2.0, requires_grad=True)
        model.requires_grad_(False)
        with attach(model, make_sae(at, width=width(model, at)), [add(3, amount), scale(5, 2.0)]):
            model(IDS).logits.logsumexp(-1).sum().backward()
        return [amount.grad]

    return case


def captured(model):
    places = [Hookpoint.parse(at) for at in there(model, (*SITES, GATE, DOWN, QUERY))]
    return [*capture(model, IDS, places).values()]


def twins(model):
    other = twin(model)
    with attach(other, make_sae("attn_z.1", width=width(model, "attn_z.1")), EDITS):
        return [*run(other), logits(model)]


def ablations(at):
    def case(model):
        sae = make_sae(at, width=width(model, at))
        found = ablation_effects(model, sae, IDS, positions=[3], horizon=3, progress=False)
        return [found.kl, found.latents]

    return case


def attributions(model):
    sae = make_sae("mlp_act.1", width=width(model, "mlp_act.1"))
    found = attribute(model, sae, IDS, next_token_loss(IDS), progress=False)
    return [found["mlp_act.1"].to_dense()]


def compiled(model):
    sae = make_sae("resid_post.1")
    with attach(model, sae, EDITS, compiled=True) as attachment:
        found = run(model)
        attachment.edits = add(3, -4.0)
        return [*found, *run(model), attachment.codes["resid_post.1"].to_dense()]


def alone(model):
    """One process observes; the others know nothing of it and do not wait."""
    watches = not dist.is_initialized() or dist.get_rank() == 0
    with attach(model, make_sae("resid_post.1")) if watches else nullcontext():
        return run(model)


def graph(model):
    """What torch.compile makes of the hooks, at a split tensor too."""
    torch.compiler.reset()
    saes = {at: make_sae(at, width=width(model, at)) for at in ("resid_post.1", "attn_z.1")}
    edits = [add(3, 2.0, sae="resid_post.1"), scale(5, 2.0, sae="attn_z.1")]
    whole = torch.compile(model, backend="eager")
    with attach(model, saes, edits, compiled=True), torch.no_grad():
        return [whole(IDS, use_cache=False).logits]


CASES = {
    **{at: edited(at, *EDITS) for at in SITES},
    **{f"{at} spliced": edited(at, *EDITS, splice=True) for at in ("resid_mid.1", "mlp_act.1")},
    **{name: edited("resid_post.1", one) for name, one in OPERATIONS.items()},
    **{f"attn_z {name}": edited("attn_z.1", one) for name, one in OPERATIONS.items()},
    "gate_proj": edited(GATE, *EDITS),
    "down_proj": edited(DOWN, *EDITS),
    "q_proj:in": edited(QUERY, *EDITS),
    "jumprelu": edited("mlp_act.1", *EDITS, activation="jumprelu"),
    "refined": edited("resid_post.1", *EDITS, refine=True, splice=True),
    "several": several,
    "transcoder": transcoder,
    "inner transcoder": inner_transcoder,
    "padded": padded,
    "gradient": gradient("resid_post.1"),
    "gradient attn_z": gradient("attn_z.1"),
    "captured": captured,
    "twin": twins,
    "ablation": ablations("resid_post.1"),
    "ablation mlp_act": ablations("mlp_act.1"),
    "attribution": attributions,
    "compiled": compiled,
    "alone": alone,
}


# -- plain modules, split by torch itself ----------------------------------------------------------


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.entry = nn.Identity()
        self.norm, self.up = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, INNER)
        self.act, self.down = nn.ReLU(), nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(self.entry(x)))))


X = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1))


def toy(at, width):
    def case(model):
        with attach(model, make_sae(at, width=width), EDITS, splice=True) as attachment:
            with torch.no_grad():
                y = model(X)
            return [y, attachment.codes[at].to_dense()]

    return case


TOYS = {
    "norm": toy("norm", HIDDEN),  # split by tokens
    "act": toy("act", INNER),  # by neurons
    "down:in": toy("down:in", INNER),
    "up": toy("up", INNER),
    "up:in": toy("up:in", HIDDEN),
}


# In the slow test: what other architectures might do differently.
FEW = (*SITES, "several", "captured", "twin", "gradient", "gradient attn_z")
ALL = CASES | {"graph": graph}


def refused(act):
    """What the refusal says."""
    try:
        act()
    except HookpointError as error:
        return str(error)
    return "not refused"
