"""EleutherAI's sparsify: `<module path>/cfg.json` + `sae.safetensors`, one `config.json` above all.

    encoder.weight [num_latents, d], encoder.bias, W_dec [num_latents, d], b_dec | W_skip [d, d]

An SAE reads and writes the output of the module its folder is called after (`layers.10`, relative
to `model.base_model`); a transcoder reads that module's input. Many seeds lie in `seedN` below it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from saert.activations import AbsTopK, Activation, GroupMax, TopK
from saert.hookpoint import Hookpoint, HookpointError
from saert.hub.checkpoint import Checkpoint, Family, parse_hookpoint
from saert.sae import SAE

CONFIG, WEIGHTS, TRAINING = "cfg.json", "sae.safetensors", "config.json"
TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
MATTER = {
    "activation", "expansion_factor", "num_latents", "signed", "skip_connection", "transcode",
}  # fmt: skip
# Under multi_topk sparsify's forward returns the 4k latents of that loss; its encode keeps to k.
TRAINING_ONLY = {"normalize_decoder", "multi_topk"}
# In sparsify's repository, not yet in a release; `True` adds terms that saert has not.
EXPERIMENTAL = {"embed_skip", "gram_lookup"}
EXPERIMENTAL_ONLY = {"lookup_max_order", "gram_table_hash"}

# A block or something in it, or the embedding. Folders of other names say no more than a name.
MODULE = re.compile(
    r"(?:[A-Za-z_]\w*\.)+\d+(?:\.\w+)*|(?:\w+\.)*(?:embed_tokens|embed_in|word_embeddings|wte)"
)


def read(c: Checkpoint) -> SAE:
    """sparsify's SparseCoder, old and new (`Sae` until February 2025).

    Refuses unknown keys (forks add kinds of selection and normalisation), tensors that contradict
    the config, and a transcoder whose folder is not called after a module.
    """
    config = c.expect_keys(
        CONFIG, {"d_in", "k"}, MATTER | TRAINING_ONLY | EXPERIMENTAL | EXPERIMENTAL_ONLY
    )
    for key in EXPERIMENTAL:
        c.expect_value(CONFIG, key, False, default=False)
    skip = bool(c.expect_value(CONFIG, "skip_connection", True, False, default=False))
    c.expect_tensors(TENSORS | {"W_skip"} if skip else TENSORS)
    num_latents, d = c.matrix("encoder.weight")
    c.expect_size(CONFIG, "d_in", d)
    if (declared := _num_latents(c, config, d)) != num_latents:
        raise c.error(f"{CONFIG} declares {declared} latents, but the tensors hold {num_latents}")
    shapes = {"encoder.bias": (num_latents,), "W_dec": (num_latents, d), "b_dec": (d,)}
    for name, shape in (shapes | ({"W_skip": (d, d)} if skip else {})).items():
        c.expect_shape(name, *shape)

    training = c.configs.get(TRAINING, {})
    training = training if isinstance(training.get("sae"), Mapping) else {}  # or not sparsify's
    name = _folder(c)
    read_at, write_at = _hookpoints(c, name, training, _transcodes(c, skip, training))
    return SAE.from_weights(
        c.tensors.get("encoder.weight"),
        c.tensors.get("W_dec"),
        c.tensors.get("encoder.bias"),
        c.tensors.get("b_dec"),
        activation=_activation(c),
        hookpoint=read_at,
        target_hookpoint=write_at,
        # transcoders older than the key did subtract it
        subtract_b_dec=not config.get("transcode", False),
        W_skip=c.tensors.get("W_skip") if skip else None,
        metadata=_metadata(training) | {"format": "sparsify", "hook_name": name},
    )


def _num_latents(c: Checkpoint, config: Mapping[str, Any], d: int) -> int:
    if config.get("num_latents") and (stated := c.integer(CONFIG, "num_latents")):
        return stated
    return d * (c.integer(CONFIG, "expansion_factor") if "expansion_factor" in config else 32)


def _activation(c: Checkpoint) -> Activation:
    k = c.integer(CONFIG, "k")
    kind = c.expect_value(CONFIG, "activation", "topk", "groupmax", default="topk")
    signed = c.expect_value(CONFIG, "signed", True, False, default=False)
    if kind == "groupmax":
        if signed:
            raise c.error(f"{CONFIG}: signed and groupmax, which no release of sparsify had")
        return GroupMax(k)
    return AbsTopK(k) if signed else TopK(k)


def _transcodes(c: Checkpoint, skip: bool, training: Mapping[str, Any]) -> bool:
    """Whether it is a transcoder; one older than cfg.json's key is known by what lies around it."""
    stated = c.configs[CONFIG].get("transcode")
    if stated is not None:
        c.expect_value(CONFIG, "transcode", True, False)
    if (asked := c.option("transcode", None, True, False)) is not None:
        return bool(asked)
    if stated or training.get("transcode") is True:
        return True
    # of a local path only the folders that stand for the repo
    repo = PurePosixPath(c.where.removesuffix(c.path)).name
    return stated is None and (skip or "transcoder" in f"{repo}/{c.path}".lower())


def _folder(c: Checkpoint) -> str:
    named = [one for one in PurePosixPath(c.where).parts if not re.fullmatch(r"seed\d+", one)]
    return named[-1] if named else ""


def _hookpoints(
    c: Checkpoint, name: str, training: Mapping[str, Any], transcodes: bool
) -> tuple[Hookpoint | None, Hookpoint | None]:
    trained = training.get("hookpoints")
    is_module = isinstance(trained, list) and name in trained or MODULE.fullmatch(name) is not None
    if not transcodes:
        return (parse_hookpoint(name) if is_module else None), None
    try:
        if is_module:
            return Hookpoint.parse(f"{name}:in"), Hookpoint.parse(f"{name}:out")
    except HookpointError:
        pass
    # without a target it would pass for an SAE
    raise c.error(
        f"a transcoder in a folder called {name!r}; expected the path of the module whose input "
        "it reads and whose output it writes, such as layers.7.mlp (rename the folder)"
    )


def _metadata(training: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"model": str, "revision": str, "dataset": str, "ctx_len": int}
    ours = {"model": "base_model", "revision": "base_model_revision", "ctx_len": "context_size"}
    return {
        ours.get(key, key): value
        for key, kind in kinds.items()
        if isinstance(value := training.get(key), kind)
    }


FAMILIES = (
    Family(
        "sparsify",
        re.escape(WEIGHTS),
        read,
        needs=(CONFIG,),
        may=(f"^{TRAINING}",),
        options=frozenset({"transcode"}),
    ),
)
