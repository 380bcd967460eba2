"""What other libraries call the models of the Hub."""

from __future__ import annotations

_HUB = """
gpt2 gpt2-medium gpt2-large gpt2-xl distilgpt2
EleutherAI/gpt-neo-125M EleutherAI/gpt-neo-1.3B EleutherAI/gpt-neo-2.7B EleutherAI/gpt-j-6B
EleutherAI/gpt-neox-20b EleutherAI/pythia-14m EleutherAI/pythia-31m
facebook/opt-125m facebook/opt-1.3b facebook/opt-2.7b facebook/opt-6.7b facebook/opt-13b
google/gemma-2b google/gemma-2b-it google/gemma-7b google/gemma-7b-it
google/gemma-2-2b google/gemma-2-2b-it google/gemma-2-9b google/gemma-2-9b-it
google/gemma-2-27b google/gemma-2-27b-it google/gemma-3-270m google/gemma-3-270m-it
google/gemma-3-1b-pt google/gemma-3-1b-it google/gemma-3-4b-pt google/gemma-3-4b-it
google/gemma-3-12b-pt google/gemma-3-12b-it google/gemma-3-27b-pt google/gemma-3-27b-it
meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct meta-llama/Meta-Llama-3-70B
meta-llama/Meta-Llama-3-70B-Instruct meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct
meta-llama/Llama-3.1-70B meta-llama/Llama-3.1-70B-Instruct meta-llama/Llama-3.2-1B
meta-llama/Llama-3.2-1B-Instruct meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct
meta-llama/Llama-3.3-70B-Instruct
mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1 mistralai/Mixtral-8x7B-v0.1
microsoft/phi-1 microsoft/phi-1_5 microsoft/phi-2 microsoft/Phi-3-mini-4k-instruct microsoft/phi-4
openai/gpt-oss-20b deepseek-ai/DeepSeek-R1-Distill-Llama-8B
Qwen/Qwen2-0.5B Qwen/Qwen2-1.5B Qwen/Qwen2-7B Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-3B
Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-14B Qwen/Qwen2.5-32B Qwen/Qwen3-0.6B
Qwen/Qwen3-1.7B Qwen/Qwen3-4B Qwen/Qwen3-8B Qwen/Qwen3-14B
"""
_PYTHIA = {  # the sizes that the Pythia models had before they were recounted
    "70m": "19m", "160m": "125m", "410m": "350m", "1b": "800m", "1.4b": "1.3b", "2.8b": "2.7b",
    "6.9b": "6.7b", "12b": "13b",
}  # fmt: skip
ALIASES = {name.rpartition("/")[2].lower(): name for name in _HUB.split()}
ALIASES |= {
    f"pythia-{size}{kind}": f"EleutherAI/pythia-{now}{kind}"
    for now, before in _PYTHIA.items()
    for size in (before, now)
    for kind in ("", "-deduped", "-v0", "-deduped-v0")
}
ALIASES |= {
    f"tiny-stories-{short}": f"roneneldan/TinyStories-{size}"
    for short, size in (
        ("1m", "1M"), ("3m", "3M"), ("8m", "8M"), ("28m", "28M"), ("33m", "33M"),
        ("1l-21m", "1Layer-21M"), ("2l-33m", "2Layers-33M"),
    )
}  # fmt: skip
ALIASES |= {
    "gpt2-small": "gpt2",
    "distil-gpt2": "distilgpt2",
    "gpt-neo-small": "EleutherAI/gpt-neo-125M",
    "gpt-neo-medium": "EleutherAI/gpt-neo-1.3B",
    "gpt-neo-large": "EleutherAI/gpt-neo-2.7B",
    "gpt-j": "EleutherAI/gpt-j-6B",
    "gpt-neox": "EleutherAI/gpt-neox-20b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "meta-llama-3.1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "phi-3": "microsoft/Phi-3-mini-4k-instruct",
    "gpt-oss": "openai/gpt-oss-20b",
}
"""Names that TransformerLens and SAELens use, in lower case, and the Hub ids they stand for."""


def hub_id(name: str) -> str:
    """The Hub id that a TransformerLens or SAELens name stands for; any other name as it is."""
    return name if "/" in name else ALIASES.get(name.lower(), name)
