"""The script that does what a setup says, with public names only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saert.hub.bundled import NAME

if TYPE_CHECKING:
    from saert.measure.steering.setup import Setup
    from saert.measure.steering.spec import EditSpec


def snippet(setup: Setup, strict: bool) -> str:
    """A whole Python script that prints the default and the steered text of a setup.

    Raises ValueError: `splice` without an SAE to splice.
    """
    sources = setup.sources
    if setup.splice and not sources:
        raise ValueError("splice: no SAE is named, neither by an edit nor in saes")
    used = sorted({edit.op for edit in setup.edits} | {"attach", "load"} if sources else ())
    if any(edit.when is not None for edit in setup.edits):
        used = sorted({*used, "active"})
    names = {source: f"saes[{i}]" for i, source in enumerate(sources)}
    return "\n".join(
        [
            *_imports(setup, used),
            "",
            *_model(setup),
            *_prompt(setup),
            f"options = dict({_arguments(setup.sampling.options())})",
            *_saes(sources),
            *_edits(setup, names),
            "",
            f"torch.manual_seed({setup.sampling.seed})",
            "default = model.generate(ids, attention_mask=torch.ones_like(ids), **options)",
            *_steered(setup, strict),
            "",
            'for name, tokens in (("Default", default), ("Steered", steered)):',
            "    text = tokenizer.decode(tokens[0], clean_up_tokenization_spaces=False)",
            '    print(f"{name}:\\n{text}\\n")',
            "",
        ]
    )


def _imports(setup: Setup, used: list[str]) -> list[str]:
    ours = setup.model == NAME
    return [
        "import torch",
        *([] if ours else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]),
        *([""] if ours or used else []),
        *([f"from saert import {', '.join(used)}"] if used else []),
        *(["from saert.hub import bundled"] if ours else []),
    ]


def _model(setup: Setup) -> list[str]:
    if setup.model == NAME:
        return ["model, tokenizer = bundled.model(), bundled.tokenizer()"]
    return [
        f"name = {_quoted(setup.model)}",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "model = AutoModelForCausalLM.from_pretrained(name).eval().to(device)",
    ]


def _prompt(setup: Setup) -> list[str]:
    if not setup.chat:
        made = f'tokenizer({_quoted(setup.prompt)}, return_tensors="pt")'
    else:
        said = f'[{{"role": "user", "content": {_quoted(setup.prompt)}}}]'
        how = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        made = f"tokenizer.apply_chat_template(\n    {said},\n    {how},\n)"
    return [f'ids = {made}["input_ids"].to(model.device)']


def _saes(sources: tuple[str, ...]) -> list[str]:
    if not sources:
        return []
    return ["saes = [", *(f"    load({_quoted(source)})," for source in sources), "]"]


def _edits(setup: Setup, names: dict[str, str]) -> list[str]:
    if not setup.edits:
        return []
    return ["edits = [", *(f"    {_edit(edit, names[edit.sae])}," for edit in setup.edits), "]"]


def _edit(edit: EditSpec, sae: str) -> str:
    where = [f"sae={sae}"]
    if edit.phase != "all":
        where.append(f"phase={_quoted(edit.phase)}")
    if edit.when is not None:
        where.append(f"when=active({edit.when}, {edit.above!r})")
    return f"{edit.op}({edit.latent}, {edit.amount!r}, {', '.join(where)})"


def _steered(setup: Setup, strict: bool) -> list[str]:
    if not setup.sources:
        return ["steered = default"]
    arguments = ["model", "saes", *(["edits"] if setup.edits else [])]
    arguments += ["splice=True"] if setup.splice else []
    arguments += [] if strict else ["strict=False"]
    return [
        "",
        f"with attach({', '.join(arguments)}):",
        f"    torch.manual_seed({setup.sampling.seed})",
        "    steered = model.generate(ids, attention_mask=torch.ones_like(ids), **options)",
    ]


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _quoted(text: str) -> str:
    """As `repr`, in double quotes where that needs no escape."""
    plain = repr(text)
    return plain if '"' in text else f'"{plain[1:-1]}"'
