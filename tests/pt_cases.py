"""SAEs drawn for tests of other people's files, and what they compute, token by token."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from saert.hub.load import load
from saert.sae import SAE

Activate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Drawn:
    """W_enc and W_dec [n, d], a latent to a row; b_enc, theta and the gate's vectors [n]; b_dec."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    theta: Tensor
    b_gate: Tensor
    r_mag: Tensor


def draw(n: int = 24, d: int = 8, dtype: torch.dtype = torch.float32) -> Drawn:
    generator = torch.Generator().manual_seed(n * d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Drawn(
        normal(n, d), normal(n, d), normal(n) / 3, normal(d) / 2, normal(n).exp() / 2,
        normal(n) / 2, normal(n) / 4,
    )  # fmt: skip


def relu(pre: Tensor) -> Tensor:
    return pre.clamp(min=0)


def topk(k: int) -> Activate:
    def activate(pre: Tensor) -> Tensor:
        kept = pre.argsort(descending=True)[:k]
        return torch.zeros_like(pre).index_copy(0, kept, pre[kept]).clamp(min=0)

    return activate


def above(theta: Tensor | float) -> Activate:
    return lambda pre: torch.where((pre > theta) & (pre > 0), pre, 0.0)


def compute(
    w: Drawn,
    x: Tensor,
    activate: Activate,
    *,
    subtract: bool,
    layer_norm: bool = False,
    b_enc: bool = True,
) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction by the equations of the format."""
    W_enc, W_dec, b_dec = w.W_enc.double(), w.W_dec.double(), w.b_dec.double()
    latents, outputs = [], []
    for token in x.double():
        mean, std = (token.mean(), token.std()) if layer_norm else (0.0, 1.0)
        z = (token - mean) / (std + 1e-5) if layer_norm else token
        pre = W_enc @ (z - b_dec if subtract else z) + (w.b_enc.double() if b_enc else 0)
        latents.append(activate(pre))
        outputs.append((latents[-1] @ W_dec + b_dec) * std + mean)
    return torch.stack(latents), torch.stack(outputs)


def agrees(sae: SAE, x: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """The same support, and values within 1e-4 of the largest."""
    latents, output = (one.float() for one in expected)
    found = sae.encode(x).to_dense()
    assert latents.any()
    assert (found != 0).equal(latents != 0)
    for value, wanted in ((found, latents), (sae(x), output)):
        within = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(value, wanted, rtol=0, atol=within)


def agrees_with_case(folder: Path, dtype: torch.dtype | None) -> SAE:
    """A checkpoint of shared/cases gives what the library that it belongs to gave."""
    case = json.loads((folder / "case.json").read_text())
    sae = load(folder / "repo", case["path"], dtype=dtype)
    expected = load_file(folder / "expected.safetensors")
    agrees(sae, expected["x"], (expected["latents"], expected["recon"]))
    return sae


# -- layouts: a file of each family, and how it computes ----------------------------------------

K = 4
NEURAL = "resid_post_mlp_v5_32k/autoencoders/6.pt"
LLAMA = "Llama-3.1-8B-Instruct-SAE-l19.pth"
DEEPSEEK = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
QWEN = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4/layer5.sae.pt"
ATTENTION = "gpt2-small_L9_Hcat_z_ds24.pt"
BATCH = "run/sae.pt"


def write(root: Path, path: str, content: Any, **configs: Any) -> Path:
    """A `.pt`, and JSON files beside it; returns the root."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    for name, config in configs.items():
        (file.parent / f"{name}.json").write_text(json.dumps(config))
    return root


def linear(w: Drawn, encoder: str, decoder: str) -> dict[str, Any]:
    return {
        f"{encoder}.weight": w.W_enc,
        f"{encoder}.bias": w.b_enc,
        f"{decoder}.weight": w.W_dec.T.contiguous(),
        f"{decoder}.bias": w.b_dec,
    }


def openai(w: Drawn, **more: Any) -> dict[str, Any]:
    n = len(w.W_enc)
    return {
        "encoder.weight": w.W_enc,
        "decoder.weight": w.W_dec.T.contiguous(),
        "latent_bias": w.b_enc,
        "pre_bias": w.b_dec,
        "stats_last_nonzero": torch.zeros(n, dtype=torch.long),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
    } | more


V5 = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def parameters(w: Drawn, **more: Any) -> dict[str, Any]:
    return dict(W_enc=w.W_enc.T.contiguous(), W_dec=w.W_dec, b_enc=w.b_enc, b_dec=w.b_dec, **more)


def qwen(w: Drawn) -> dict[str, Any]:
    return dict(W_enc=w.W_enc, W_dec=w.W_dec.T.contiguous(), b_enc=w.b_enc, b_dec=w.b_dec)


def attention_config(w: Drawn, **more: Any) -> dict[str, Any]:
    n, d = w.W_enc.shape
    return dict(
        act_name="blocks.9.attn.hook_z", act_size=d, dict_size=n, model_name="gpt2-small", site="z",
        layer=9, seq_len=128, concat_heads=True, head="cat", lr=0.0012, resample_scheme="anthropic",
    ) | more  # fmt: skip


def batch_config(w: Drawn, kind: str, **more: Any) -> dict[str, Any]:
    n, d = w.W_enc.shape
    return dict(
        sae_type=kind, act_size=d, dict_size=n, top_k=K, input_unit_norm=True, seq_len=128,
        model_name="gpt2-small", hook_point="blocks.8.hook_resid_pre", dtype="torch.float32",
        dataset_path="Skylion007/openwebtext", site="resid_pre", layer=8, bandwidth=0.001,
    ) | more  # fmt: skip


Case = Callable[[Path, Drawn], tuple[str, dict[str, Any]]]  # its path, and how it computes


def batch(
    kind: str, theta: Callable[[Drawn], Any], normed: bool, more: Callable[[Drawn], dict[str, Any]]
) -> Case:
    def case(root: Path, w: Drawn) -> tuple[str, dict[str, Any]]:
        config = batch_config(w, kind, input_unit_norm=normed)
        write(root, BATCH, parameters(w, **more(w)), config=config)
        ranked = kind in ("topk", "batchtopk")
        return "run", dict(
            activate=theta(w), subtract=kind != "jumprelu", layer_norm=normed, b_enc=not ranked
        )  # fmt: skip

    return case


CASES: dict[str, Case] = {
    "OpenAI 5": lambda root, w: (
        write(root, NEURAL, openai(w, **V5)) and NEURAL,
        dict(activate=topk(K), subtract=True, layer_norm=True),
    ),
    "OpenAI 1": lambda root, w: (
        write(root, NEURAL, openai(w)) and NEURAL,
        dict(activate=relu, subtract=True),
    ),
    "Goodfire": lambda root, w: (
        write(root, LLAMA, linear(w, "encoder_linear", "decoder_linear")) and LLAMA,
        dict(activate=relu, subtract=False),
    ),
    "qresearch": lambda root, w: (
        write(root, DEEPSEEK, linear(w, "encoder", "decoder")) and DEEPSEEK,
        dict(activate=relu, subtract=False),
    ),
    "Qwen Scope": lambda root, w: (
        write(root, QWEN, qwen(w)) and QWEN,
        dict(activate=topk(K), subtract=False),
    ),
    "ckkissane": lambda root, w: (
        write(root, ATTENTION, parameters(w), **{f"{ATTENTION[:-3]}_cfg": attention_config(w)})
        and ATTENTION,
        dict(activate=relu, subtract=True),
    ),
    "BatchTopK vanilla": batch("vanilla", lambda w: relu, False, lambda w: {}),
    "BatchTopK topk": batch("topk", lambda w: topk(K), True, lambda w: {}),
    "BatchTopK batchtopk": batch(
        "batchtopk", lambda w: above(0.7), True, lambda w: {"threshold": torch.tensor(0.7)}
    ),
    "BatchTopK jumprelu": batch(
        "jumprelu",
        lambda w: above(w.theta.double()),
        True,
        lambda w: {"jumprelu.log_threshold": w.theta.log()},
    ),
}
