"""`saert ablate` prints what `ablation_effects` computes, and goes on where it was stopped."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from saert.cli import app
from saert.hub import bundled
from saert.hub.format import save
from saert.measure.ablation.ablate import ablation_effects, direction_effects
from saert.measure.ablation.table import AblationEffects

PROMPT = "The dog ran"


def run(*args: str) -> dict:
    found = CliRunner().invoke(app, ["ablate", *args, "--json", "--no-progress"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_a_prompt() -> None:
    answer = run("--prompt", PROMPT, "--positions", "1:2", "--channels", "4", "--random", "3")
    model, tokenizer = bundled.model(), bundled.tokenizer()
    sae = bundled.sae(bundled.DEMO.hookpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    effects = ablation_effects(model, sae, ids, positions=1, progress=False)
    assert answer["summary"]["latents"] == pytest.approx(effects.summary(), rel=1e-5, nan_ok=True)
    strongest = effects.sort("kl")
    assert [one["latent"] for one in answer["effects"]] == strongest.latents[:20].tolist()
    promoted = [tokenizer.decode([i]) for i in strongest.top_promoted[0].tolist()]
    assert answer["effects"][0]["promotes"] == promoted
    for name, count in (("channels", 4), ("random directions", 3)):
        other = direction_effects(
            model, "resid_post.2", ids, f"{name.split()[0]}:{count}", positions=1, progress=False
        )
        expected = pytest.approx(other.summary(), rel=1e-5, nan_ok=True)
        assert answer["summary"][name] == expected


def test_rows_are_kept_and_not_done_again(tmp_path) -> None:
    args = ("--rows", "3", "--context", "8", "--latents", "attributed:4", "--out", str(tmp_path))
    first = run(*args)
    kept = sorted((tmp_path / "rows" / "latents").iterdir())
    assert len(kept) == 3
    whole = AblationEffects.load(tmp_path / "latents.safetensors")
    assert whole.rows.unique().tolist() == [0, 1, 2] and len(whole) == 12
    kept[1].unlink()
    untouched = kept[0].stat().st_mtime_ns
    assert run(*args) == first
    assert kept[0].stat().st_mtime_ns == untouched and kept[1].exists()
    again = AblationEffects.load(tmp_path / "latents.safetensors")
    torch.testing.assert_close(again.kl, whole.kl, rtol=1e-6, atol=0)
    found = CliRunner().invoke(app, ["ablate", *args, "--horizon", "4"])
    assert found.exit_code == 2 and "horizon: there 16, now 4" in found.output


def test_another_place_or_encoder_is_not_taken_for_the_same(tmp_path) -> None:
    args = ("--rows", "1", "--context", "6", "--positions", "3", "--out", str(tmp_path / "kept"))
    sae = bundled.sae("resid_post.1")
    save(sae, tmp_path / "sae")
    start = ("ablate", str(tmp_path / "sae"), "-m", "bundled", *args)
    assert CliRunner().invoke(app, [*start]).exit_code == 0
    found = CliRunner().invoke(app, [*start, "--hookpoint", "resid_post.2"])
    assert found.exit_code == 2 and "sae.hookpoint" in found.output
    sae.W_enc.data *= 1.5
    save(sae, tmp_path / "sae")
    found = CliRunner().invoke(app, [*start])
    assert found.exit_code == 2 and "sae.fingerprint" in found.output


def test_a_row_where_nothing_is_active_is_kept_as_empty(tmp_path) -> None:
    args = ("--rows", "3", "--context", "10", "--positions", "4")
    everything = run(*args, "--out", str(tmp_path / "all"))
    table = AblationEffects.load(tmp_path / "all" / "latents.safetensors")
    counts = {int(i): len(table[table.latents == i].rows.unique()) for i in table.latents.unique()}
    latent = next(i for i, rows in counts.items() if rows < 3)
    some = run(*args, "--latents", str(latent), "--out", str(tmp_path / "one"))
    assert some["summary"]["latents"]["count"] == int((table.latents == latent).sum())
    assert everything["summary"]["latents"]["count"] == len(table)


def test_for_people() -> None:
    found = CliRunner().invoke(app, ["ablate", "-p", PROMPT, "--top", "3", "--no-progress"])
    assert found.exit_code == 0
    assert "latents by replay: mean sparsity" in found.output and "nan" not in found.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--sort", "size"), "expected one of kl"),
        (("-p", "a", "--data", "b"), "give one of them"),
        (("-p", "a", "--latents", "many"), 'expected "active"'),
        (("-p", "a", "--latents", "9999"), "expected 0 to 1023"),
        (("-p", "a", "--positions", "99"), "outside a row"),
    ],
)
def test_refusals(args: tuple[str, ...], message: str) -> None:
    found = CliRunner().invoke(app, ["ablate", *args])
    assert found.exit_code == 2 and message in found.output
