"""What other libraries make of our checkpoints, and theirs for us: see tests/test_peers.py.

PYTHON tests/peers_run.py sae_lens|sparsify FOLDER

Runs where those libraries are installed, and imports nothing of ours.

    FOLDER/ours/NAME/{x.safetensors, <the checkpoint's folder>}  ->  found.safetensors or error.txt
    FOLDER/theirs/NAME/{<a checkpoint of theirs>, expected.safetensors}      is made
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D, N, K = 10, 24, 5
Outputs = tuple[torch.Tensor, torch.Tensor]  # latents, reconstruction


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter its own values, none special: biases are not 0, decoder rows not 1 long."""
    for name, parameter in sorted(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = (values.abs() / 2 if "threshold" in name else values / 2).to(parameter)


# -- SAELens -------------------------------------------------------------------------------------


def sae_lens_outputs(folder: Path, x: torch.Tensor) -> Outputs:
    from sae_lens import SAE

    return sae_lens_run(SAE.load_from_disk(folder, device="cpu", dtype="float32"), x)


def sae_lens_run(sae, x: torch.Tensor) -> Outputs:
    latents = sae.encode(x)
    return latents.to_dense() if latents.is_sparse else latents, sae(x)


def sae_lens_checkpoints(folder: Path) -> None:
    from sae_lens import SAE

    common = dict(d_in=D, d_sae=N, dtype="float32", device="cpu", apply_b_dec_to_input=False)
    out = dict(hook_name_out="blocks.2.hook_mlp_out")
    topk = dict(architecture="topk", k=K)
    cases: dict[str, tuple[dict, dict]] = {
        "standard": (dict(architecture="standard"), {}),
        "standard b_dec": (dict(architecture="standard", apply_b_dec_to_input=True), {}),
        "standard layer_norm": (
            dict(architecture="standard", normalize_activations="layer_norm"),
            {},
        ),
        "standard constant_norm_rescale": (
            dict(architecture="standard", normalize_activations="constant_norm_rescale"),
            {},
        ),
        "topk": (topk, {}),
        "topk rescaled": (topk | dict(rescale_acts_by_decoder_norm=True), {}),
        "topk hook_z": (topk | dict(reshape_activations="hook_z"), {}),
        "abstopk": (dict(architecture="abstopk", k=K), {}),
        "jumprelu": (dict(architecture="jumprelu"), {}),
        "gated": (dict(architecture="gated"), {}),
        "matching_pursuit": (
            dict(architecture="matching_pursuit", max_iterations=6, residual_threshold=0.01),
            {},
        ),
        "transcoder": (dict(architecture="transcoder", d_out=7), out),
        "skip_transcoder": (dict(architecture="skip_transcoder", d_out=7), out),
        "jumprelu_transcoder": (dict(architecture="jumprelu_transcoder", d_out=7), out),
        "jumprelu_skip_transcoder": (dict(architecture="jumprelu_skip_transcoder", d_out=7), out),
    }
    for number, (name, (config, metadata)) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(number)
        hook_z = "reshape_activations" in config
        metadata = metadata | dict(
            model_name="gpt2",
            hook_name=f"blocks.2.{'attn.hook_z' if hook_z else 'hook_resid_post'}",
            sae_lens_version=__import__("sae_lens").__version__,
        )
        sae = SAE.from_dict(common | config | dict(metadata=metadata))
        randomise(sae, generator)
        if config["architecture"] == "matching_pursuit":
            sae.W_dec.data /= sae.W_dec.norm(dim=-1, keepdim=True)
        sae.save_model(folder / name / "sae")
        x = torch.randn(40, *((2, D // 2) if hook_z else (D,)), generator=generator)
        keep(folder / name, x, sae_lens_run(sae, x))


# -- sparsify ------------------------------------------------------------------------------------


def sparsify_outputs(folder: Path, x: torch.Tensor) -> Outputs:
    from sparsify import SparseCoder

    return sparsify_run(SparseCoder.load_from_disk(folder).float(), x)


def sparsify_run(coder, x: torch.Tensor) -> Outputs:
    values, indices, _ = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter(-1, indices, values)
    coder.cfg.multi_topk = False  # its forward then returns what the extra loss is computed on
    return latents, coder(x).sae_out


def sparsify_checkpoints(folder: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    cases: dict[str, tuple[str, dict]] = {
        "topk": ("layers.3", dict(expansion_factor=3)),
        "groupmax": ("layers.3", dict(num_latents=25, activation="groupmax")),
        "skip": ("h.0", dict(num_latents=N, skip_connection=True)),
        "transcoder": ("layers.3.mlp", dict(expansion_factor=2, transcode=True)),
        "skip transcoder": (
            "layers.3.mlp",
            dict(num_latents=N, transcode=True, skip_connection=True),
        ),
        "multi_topk": ("h.0.attn/seed1", dict(num_latents=N, multi_topk=True)),
    }
    for number, (name, (module, config)) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(number)
        coder = SparseCoder(D, SparseCoderConfig(k=K, **config))
        randomise(coder, generator)
        coder.save_to_disk(folder / name / module)
        x = torch.randn(40, D, generator=generator)
        keep(folder / name, x, sparsify_run(coder, x))


# -- both ----------------------------------------------------------------------------------------


def keep(folder: Path, x: torch.Tensor, outputs: Outputs) -> None:
    latents, recon = (one.detach().float().contiguous() for one in outputs)
    tensors = dict(x=x.contiguous(), latents=latents, recon=recon)
    save_file(tensors, folder / "expected.safetensors")


def compute(folder: Path, outputs: Callable[[Path, torch.Tensor], Outputs]) -> None:
    """What they compute from one of our checkpoints, or what they say to it."""
    (checkpoint,) = (one for one in folder.iterdir() if one.is_dir())
    try:
        latents, recon = outputs(checkpoint, load_file(folder / "x.safetensors")["x"])
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        return
    found = dict(latents=latents.detach().contiguous(), recon=recon.detach().contiguous())
    save_file(found, folder / "found.safetensors")


if __name__ == "__main__":
    package, root = sys.argv[1], Path(sys.argv[2])
    outputs, make = {
        "sae_lens": (sae_lens_outputs, sae_lens_checkpoints),
        "sparsify": (sparsify_outputs, sparsify_checkpoints),
    }[package]
    for ours in sorted((root / "ours").iterdir()):
        compute(ours, outputs)
    make(root / "theirs")
