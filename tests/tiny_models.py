"""A tiny random model per architecture: 3 layers, hidden 32, vocabulary 97, made in milliseconds.

Every parameter is random, biases and norm weights included, so that a forgotten bias or a norm read
on the wrong side shows as a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

VOCAB, HIDDEN, LAYERS, HEADS, INNER = 97, 32, 3, 4, 48

# transformers' configs spell the sizes in several ways.
TOKENS: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HIDDEN_SIZE = TOKENS | dict(hidden_size=HIDDEN)
LLAMA = HIDDEN_SIZE | dict(
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
    intermediate_size=INNER, max_position_embeddings=128,
)  # fmt: skip
GPT2 = TOKENS | dict(
    n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=128,
)  # fmt: skip
GPT_NEO = HIDDEN_SIZE | dict(
    num_layers=LAYERS, num_heads=HEADS, intermediate_size=INNER, max_position_embeddings=128,
    attention_types=[[["global", "local", "global"], 1]], window_size=4,
)  # fmt: skip
OPT = HIDDEN_SIZE | dict(
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=INNER, word_embed_proj_dim=HIDDEN,
    max_position_embeddings=128,
)  # fmt: skip
BLOOM = HIDDEN_SIZE | dict(n_layer=LAYERS, n_head=HEADS)
MAMBA = HIDDEN_SIZE | dict(num_hidden_layers=LAYERS, state_size=8, time_step_rank=4)
FALCON = LLAMA | dict(alibi=False, bias=True)
HEAD8 = LLAMA | dict(head_dim=8)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
WINDOW = dict(sliding_window=4)  # shorter than a test prompt, so that it matters
GEMMA = HEAD8 | WINDOW | dict(query_pre_attn_scalar=8)


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Give every floating parameter and every norm its own values; weights ~ 1/sqrt(width)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # biases and sinks near 0, norm weights near their 0 or 1
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / HIDDEN**0.5)
    return model.eval()


def build(class_name: str, **config: Any) -> PreTrainedModel:
    """The causal LM of `{class_name}Config(**config)`."""
    stem = class_name.removesuffix("Text")
    torch.manual_seed(0)
    settings = getattr(transformers, f"{class_name}Config")(**config)
    causal = next(
        getattr(transformers, stem + head)
        for head in ("ForCausalLM", "LMHeadModel")
        if hasattr(transformers, stem + head)
    )
    return randomise(causal(settings))


_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gptj": ("GPTJ", GPT2 | dict(rotary_dim=4)),
    "gpt_neo": ("GPTNeo", GPT_NEO),
    "gpt_neox": ("GPTNeoX", LLAMA | dict(use_parallel_residual=True)),
    "gpt_neox_sequential": ("GPTNeoX", LLAMA | dict(use_parallel_residual=False)),
    "llama": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", LLAMA | WINDOW),
    "mixtral": ("Mixtral", LLAMA | EXPERTS),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=12)),  # so that heads * head_dim is not hidden_size
    # layer 0 dense, the others sparse
    "qwen3_moe": (
        "Qwen3Moe",
        HEAD8 | EXPERTS | dict(num_experts=4, moe_intermediate_size=24, mlp_only_layers=[0]),
    ),
    "gemma": ("Gemma", HEAD8),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3Text", GEMMA),
    "phi": ("Phi", LLAMA),
    "phi3": ("Phi3", LLAMA),
    "opt": ("OPT", OPT),
    # as opt-350m: narrow embeddings, norms on the stream
    "opt_post_norm": ("OPT", OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "olmo": ("Olmo", LLAMA),
    "olmo2": ("Olmo2", LLAMA),
    "olmo3": ("Olmo3", LLAMA | WINDOW),
    "falcon_sequential": ("Falcon", FALCON | dict(parallel_attn=False, multi_query=False)),
    "falcon_parallel": ("Falcon", FALCON | dict(parallel_attn=True, multi_query=True)),
    "falcon_new": ("Falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "bloom": ("Bloom", BLOOM),
    "bloom_post_norm": ("Bloom", BLOOM | dict(apply_residual_connection_post_layernorm=True)),
    "stablelm": ("StableLm", LLAMA | dict(use_parallel_residual=False, use_qkv_bias=True)),
    "stablelm_parallel": ("StableLm", LLAMA | dict(use_parallel_residual=True)),
    "granite": ("Granite", LLAMA | dict(residual_multiplier=0.22, embedding_multiplier=12.0)),
    "cohere": ("Cohere", LLAMA),
    "smollm3": ("SmolLM3", LLAMA | dict(no_rope_layers=[1, 0, 1])),
    "gpt_oss": ("GptOss", HEAD8 | WINDOW | EXPERTS),
    # layers 0 and 2 dense, 1 sparse
    "llama4_text": (
        "Llama4Text",
        HEAD8 | dict(num_local_experts=4, interleave_moe_layer_step=2, intermediate_size_mlp=40),
    ),
    "glm4": ("Glm4", HEAD8),
    "mamba": ("Mamba", MAMBA),
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(build, stem, **config) for name, (stem, config) in _MODELS.items()
}


def tiny(name: str) -> PreTrainedModel:
    """A fresh model of an architecture in `ARCHITECTURES`: in eval mode, the same every time."""
    return ARCHITECTURES[name]()


def tiny_multimodal(name: str = "gemma3") -> PreTrainedModel:
    """A text model beside a vision tower of the same depth: "gemma3" or "llava"."""
    torch.manual_seed(0)
    vision: dict[str, Any] = dict(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, image_size=16, patch_size=8,
    )  # fmt: skip
    if name == "gemma3":
        return randomise(
            transformers.Gemma3ForConditionalGeneration(
                transformers.Gemma3Config(
                    text_config=GEMMA,
                    vision_config=vision,
                    mm_tokens_per_image=4,
                    image_token_index=90,
                )
            )
        )
    return randomise(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**LLAMA),
                vision_config=transformers.CLIPVisionConfig(**vision),
                image_token_index=90,
            )
        )
    )


def peft_wrap(model: PreTrainedModel) -> nn.Module:
    """`model` inside a PeftModel, with a non-zero LoRA on every linear layer."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped.eval()
