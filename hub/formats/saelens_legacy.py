"""SAELens before version 6: one flat config, of the SAE, its model and its training in one.

It is put into the words of SAELens 6 (what `handle_pre_6_0_config` does there) and read as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from saert.hub.checkpoint import Checkpoint, Family
from saert.hub.formats.saelens import CONFIG, WEIGHTS, build, facts, is_version_6, version
from saert.sae import SAE

RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
    "uses_scaling_factor": "finetuning_scaling_factor",  # SAELens 2 and 3.0
}
SHAPING = {  # what decides the numbers
    "architecture", "d_in", "d_sae", "dtype", "device", "activation_fn", "activation_fn_kwargs",
    "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "finetuning_scaling_factor",
}  # fmt: skip
FACTS = {  # what is worth keeping
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name",
    "hook_head_index", "prepend_bos", "context_size", "seqpos_slice", "exclude_special_tokens",
    "dataset_path", "neuronpedia_id", "sae_lens_training_version",
}  # fmt: skip
_TRAINING = """
hook_layer hook_eval hook_point_eval sae_lens_version is_dataset_tokenized is_dataset_on_disk
dataset_trust_remote_code streaming use_cached_activations cached_activations_path
tokens_per_buffer n_batches_in_buffer training_tokens total_training_tokens finetuning_tokens
store_batch_size store_batch_size_prompts train_batch_size train_batch_size_tokens
total_training_steps shuffle act_store_device seed autocast autocast_lm compile_llm
llm_compilation_mode compile_sae sae_compilation_mode b_dec_init_method expansion_factor
normalize_sae_decoder noise_scale from_pretrained_path decoder_orthogonal_init
decoder_heuristic_init decoder_heuristic_init_norm init_encoder_as_decoder_transpose
jumprelu_init_threshold jumprelu_bandwidth adam_beta1 adam_beta2 mse_loss_normalization
mse_loss_coefficient l1_coefficient lp_norm scale_sparsity_penalty_by_decoder_norm
l1_warm_up_steps l0_lambda lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps
n_restart_cycles finetuning_method use_ghost_grads ghost_grad_coefficient
feature_sampling_window dead_feature_window dead_feature_threshold
feature_reinit_scale feature_sampling_method resample_batches
dead_feature_estimation_method n_eval_batches eval_batch_size_prompts n_eval_seqs
log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb
log_weights_to_wandb wandb_project wandb_id wandb_entity wandb_log_frequency run_name
eval_every_n_wandb_logs resume n_checkpoints checkpoint_path verbose model_kwargs
disable_concat_sequences sequence_separator_token n_batches_for_norm_estimate
"""
TRAINING = set(_TRAINING.split())
SCALES = frozenset({"scaling_factor", "finetuning_scaling_factor"})


def read(c: Checkpoint) -> SAE:
    """Refuses unknown keys, activations other than ReLU and top-k, and decoders that were scaled
    once more after training (`finetuning_scaling_factor`)."""
    config = _renamed(c)
    _refuse_scales(c, config)
    kind, extra = _architecture(c, config)
    hook_name = str(config.get("hook_name") or "")
    if "{layer}" in hook_name:
        hook_name = hook_name.replace("{layer}", str(config.get("hook_layer")))
    normalise = config.get("normalize_activations")
    if isinstance(normalise, bool):
        normalise = "expected_average_only_in" if normalise else "none"
    modern = extra | {
        "architecture": kind,
        **{key: config[key] for key in ("d_in", "d_sae") if config.get(key) is not None},
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
        "normalize_activations": normalise,
        "reshape_activations": config.get(
            "reshape_activations", "hook_z" if "hook_z" in hook_name else "none"
        ),
    }
    known = {key: config[key] for key in sorted(FACTS & set(config)) if config[key] is not None}
    if hook_name:
        known["hook_name"] = hook_name
    if name := version(config):
        known.setdefault("sae_lens_training_version", name)
    return build(
        replace(c, configs={CONFIG: modern}),
        facts(known) | {"format": "SAELens before 6"},
        ignored=SCALES,
    )


def _renamed(c: Checkpoint) -> Mapping[str, Any]:
    """The config with its older names replaced; refuse what is in neither version's words."""
    found = c.configs[CONFIG]
    if "metadata" in found:
        raise c.error(
            f"{CONFIG}: has the metadata of SAELens 6, but SAELens "
            f"{version(found) or 'no version'} as what wrote it, expected sae_lens_version 6 or "
            "later in it, or a flat config from before 6"
        )
    c.expect_keys(CONFIG, {"d_in"}, SHAPING | FACTS | TRAINING | set(RENAMED))
    return {RENAMED.get(key, key): value for key, value in found.items()}


def _architecture(c: Checkpoint, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Its name and keys in SAELens 6: top-k was an activation of the standard one."""
    kind = config.get("architecture", "standard")
    activation = config.get("activation_fn") or ("topk" if kind == "topk" else "relu")
    options = config.get("activation_fn_kwargs") or {}
    if activation == "relu" and kind != "topk" and not options:
        return str(kind), {}
    if activation == "topk" and kind in ("standard", "topk") and set(options) == {"k"}:
        return "topk", {"k": options["k"]}
    raise c.error(
        f"{CONFIG}: architecture {kind!r} with activation_fn {activation!r} and "
        f"activation_fn_kwargs {options!r}, expected 'relu' without any, or 'topk' with k for "
        "'standard' and 'topk'"
    )


def _refuse_scales(c: Checkpoint, config: Mapping[str, Any]) -> None:
    """A factor for every latent, learned after training; for a while it was saved as ones."""
    stored = sorted(SCALES & c.tensors.names)
    if config.get("finetuning_scaling_factor") and not stored:
        raise c.error(
            f"{CONFIG} says that latents were scaled after training (finetuning_scaling_factor, "
            f"uses_scaling_factor), but no tensor of {sorted(SCALES)} says by what; expected one, "
            "or the key to be false"
        )
    for name in stored:
        scale = c.tensors.get(name)
        if not torch.allclose(scale, torch.ones_like(scale)):
            raise c.error(
                f"{name} is not 1 everywhere (it goes up to {scale.max().item():.4g}): this "
                "decoder was tuned after training (finetuning_scaling_factor), which SAELens 6 "
                "cannot read either; multiply the rows of W_dec by it and drop the tensor"
            )


FAMILIES = (
    Family(
        "SAELens before 6", WEIGHTS, read, lambda c: not is_version_6(c), needs=(CONFIG,)
    ),
)  # fmt: skip
