"""Kissane and Krzyzanowski's attention SAEs for GPT-2 small: `<stem>.pt` and `<stem>_cfg.json`.

    W_enc [d, num_latents], W_dec [num_latents, d], b_enc, b_dec

ReLU autoencoders of `hook_z` with its heads side by side (Kissane et al. 2024), trained with Neel
Nanda's 1L-Sparse-Autoencoder, whose configs name other sites too.
"""

from __future__ import annotations

from saert.activations import ReLU
from saert.hub.checkpoint import Checkpoint, Family, parse_hookpoint
from saert.hub.formats.torch_files import expect_entries, known, read_weights
from saert.sae import SAE

KNOWN = {
    "act_size", "anthropic_neuron_resample_scale", "anthropic_resample_batches",
    "anthropic_resample_last", "b_dec_init", "batch_size", "beta1", "beta2", "buffer_batches",
    "buffer_mult", "buffer_size", "concat_heads", "contiguous", "dead_direction_cutoff", "device",
    "dict_mult", "dict_size", "enc_dtype", "eval_every", "head", "l1_coeff", "layer", "lr",
    "model_batch_size", "model_name", "name", "num_resamples", "num_tokens", "re_init_every",
    "reinit", "remove_rare_dir", "resample_factor", "resample_scheme", "save_state_dict_every",
    "sched_epochs", "sched_finish", "sched_lr_factor", "sched_type", "sched_warmup_epochs",
    "seed", "seq_len", "site", "test", "wandb_entity", "wandb_project_name",
}  # fmt: skip
NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def read(c: Checkpoint) -> SAE:
    """f = relu((x - b_dec) W_enc + b_enc). Refuses SAEs of a single head."""
    (file,) = (name for name in c.configs if name.endswith("_cfg.json"))
    config = c.expect_keys(file, {"act_name"}, KNOWN)
    c.expect_value(file, "concat_heads", True, default=True)
    expect_entries(c, NAMES.values())
    weights = read_weights(c, NAMES, linear=False)
    c.expect_size(file, "dict_size", weights[0].shape[0])
    c.expect_size(file, "act_size", weights[0].shape[1])
    model = config.get("model_name")
    return SAE.from_weights(
        *weights,
        activation=ReLU(),
        hookpoint=parse_hookpoint(config["act_name"]),
        subtract_b_dec=True,
        metadata=known(
            format="ckkissane",
            base_model="gpt2" if model == "gpt2-small" else model,
            hook_name=config["act_name"],
            context_size=config.get("seq_len"),
        ),
    )


FAMILIES = (
    Family(
        "ckkissane",
        r"(?P<stem>[^/]+)\.pt",
        read,
        lambda c: NAMES["W_enc"] in c.tensors.names,
        needs=("{stem}_cfg.json",),
        is_file=True,
    ),
)
