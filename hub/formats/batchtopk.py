"""Bussmann's BatchTopK repository: `sae.pt` and a flat `config.json` with `sae_type`.

    W_enc [d, num_latents], W_dec [num_latents, d], b_enc, b_dec | jumprelu.log_threshold

Every kind stores b_enc; topk and batchtopk never add it. jumprelu does not subtract b_dec, and its
thresholds are exp(log_threshold). `input_unit_norm` is OpenAI's layer norm.
"""

from __future__ import annotations

from torch import Tensor

from saert.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from saert.hub.checkpoint import Checkpoint, Family, parse_hookpoint
from saert.hub.formats.torch_files import expect_entries, known, read_scalar, read_weights
from saert.sae import SAE
from saert.transforms import LayerNorm, NoTransform

CONFIG = "config.json"
KNOWN = {
    "act_size", "aux_penalty", "bandwidth", "batch_size", "beta1", "beta2", "checkpoint_freq",
    "dataset_path", "device", "dict_size", "dtype", "hook_point", "l1_coeff", "l1_warmup_frac",
    "layer", "lr", "max_grad_norm", "model_batch_size", "model_dtype", "model_name",
    "n_batches_to_dead", "name", "num_batches_in_buffer", "num_tokens", "perf_log_freq",
    "pool_size", "quantile", "quantile_lr", "seed", "seq_len", "site", "softmax_aux_penalty",
    "top_k_aux", "wandb_project",
}  # fmt: skip
MATTER = {"activation", "input_unit_norm", "tied_weights", "top_k", "use_encoder_bias"}
NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
LOG_THRESHOLD = "jumprelu.log_threshold"
THRESHOLD = "threshold"


def read(c: Checkpoint) -> SAE:
    """vanilla, topk, batchtopk and jumprelu.

    A batchtopk file without a threshold says nothing of how it treats a token by itself: refused
    unless `threshold` is given. So are the repository's first options, where they were used.
    """
    config = c.expect_keys(CONFIG, {"sae_type"}, KNOWN | MATTER)
    kind = c.expect_value(CONFIG, "sae_type", "vanilla", "topk", "batchtopk", "jumprelu")
    c.expect_value(CONFIG, "activation", "relu", default="relu")
    c.expect_value(CONFIG, "tied_weights", False, default=False)
    normed = c.expect_value(CONFIG, "input_unit_norm", True, False, default=False)
    if normed and kind == "vanilla" and "l1_warmup_frac" in config:
        raise c.error(
            f"{CONFIG}: input_unit_norm of a vanilla SAE from the repository's first version, "
            "which ignored it; set it to false if this one was trained with that version"
        )
    expect_entries(
        c,
        {*NAMES.values(), LOG_THRESHOLD} if kind == "jumprelu" else NAMES.values(),
        optional={THRESHOLD} if kind == "batchtopk" else (),
    )
    W_enc, W_dec, b_enc, b_dec = read_weights(c, NAMES, linear=False)
    c.expect_size(CONFIG, "dict_size", W_enc.shape[0])
    c.expect_size(CONFIG, "act_size", W_enc.shape[1])
    by_rank = kind in ("topk", "batchtopk")
    add_b_enc = not by_rank or c.expect_value(
        CONFIG, "use_encoder_bias", True, False, default=False
    )
    site, model = config.get("hook_point"), config.get("model_name")
    return SAE.from_weights(
        W_enc,
        W_dec,
        b_enc if add_b_enc else None,
        b_dec,
        activation=_activation(c, kind, W_enc.shape[0]),
        hookpoint=parse_hookpoint(site),
        input_transform=LayerNorm() if normed else NoTransform(),
        subtract_b_dec=kind != "jumprelu",
        metadata=known(
            format="BatchTopK",
            base_model="gpt2" if model == "gpt2-small" else model,
            hook_name=site,
            dataset=config.get("dataset_path"),
            context_size=config.get("seq_len"),
            declared={"l0": float(config["top_k"])} if by_rank and "top_k" in config else None,
        ),
    )


def _activation(c: Checkpoint, kind: str, num_latents: int) -> Activation:
    if kind == "vanilla":
        return ReLU()
    if kind == "topk":
        return TopK(c.integer(CONFIG, "top_k"))
    if kind == "jumprelu":
        c.expect_shape(LOG_THRESHOLD, num_latents)
        return JumpReLU(c.tensors.get(LOG_THRESHOLD, exact=True).exp())
    return BatchTopK(_threshold(c))


def _threshold(c: Checkpoint) -> float | Tensor:
    given = c.options.get(THRESHOLD, read_scalar(c, THRESHOLD))
    if given is None:
        raise c.error(
            "a batchtopk SAE whose file stores no threshold: it kept the top_k · tokens largest "
            "activations of a batch. load(…, threshold=0) keeps every positive one; measure the "
            "smallest that a large batch keeps, and give that"
        )
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError(f"{c.where}: threshold={given!r}, expected a number")
    return float(given)


FAMILIES = (
    Family(
        "BatchTopK",
        r"sae\.pt",
        read,
        lambda c: "sae_type" in c.configs[CONFIG],
        needs=(CONFIG,),
        options=frozenset({THRESHOLD}),
    ),
)
