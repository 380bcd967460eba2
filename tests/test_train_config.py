"""Recipes, overrides, and the refusal of every setting that nothing knows."""

import pytest

from saert.train.config import (
    RECIPES,
    ConfigError,
    TrainConfig,
    from_table,
    load_table,
    override,
    recipe_names,
)
from saert.train.objectives import OBJECTIVES
from saert.train.objectives.jumprelu import JumpReLUObjective
from saert.train.objectives.topk import TopKObjective

TABLE = {
    "model": {"name": "bundled"},
    "data": {"source": ["a.jsonl"]},
    "sae": {"hookpoints": ["resid_post.2"], "num_latents": 64},
}


def test_a_small_table_is_enough_and_the_rest_has_defaults():
    config = from_table(TABLE)
    assert config.objective == TopKObjective() and config.data.source == ("a.jsonl",)
    assert config.steps == config.tokens // config.stream.batch_tokens


@pytest.mark.parametrize(
    "name", ["gpt2-small", "pythia-160m", "llama-3.1-8b", "gemma-2-2b", "qwen3-1.7b"]
)
def test_every_recipe_is_a_whole_configuration(name):
    assert name in recipe_names()
    config = from_table(load_table(RECIPES / f"{name}.toml"))
    assert isinstance(config, TrainConfig) and config.sae.pairs()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_written_down_reads_back_the_same(name):
    config = from_table(TABLE | {"objective": {"name": name}})
    assert config.objective.name == name
    assert from_table(config.to_dict()) == config


@pytest.mark.parametrize(
    "setting, message",
    [
        ("optimiser.emma=0.9", r"unknown key optimiser\.emma; did you mean ema\? Known: lr, betas"),
        ("tokenss=3", r"unknown key tokenss; did you mean tokens\?"),
        ("objective.kk=3", r"unknown key objective\.kk"),
        ("objective.name=topkk", r"objective\.name is 'topkk', expected one of topk, batch_topk"),
        ("objective.k=many", r"objective\.k: found 'many'; Input should be a valid integer"),
        ("objective.k=1.5", r"objective\.k: found 1\.5"),
        ("optimiser.betas=[0.9]", r"optimiser\.betas"),
        ("sae.precision=fp8", r"sae\.precision is 'fp8', expected one of"),
        ("sae.normalise=rms", r"sae\.normalise is 'rms'"),
        ("sae.hookpoints=[]", r"sae\.hookpoints is empty"),
        ("sae.skip=true", r"sae\.skip needs transcoders, written as mlp_in\.6->mlp_out\.6"),
        ("stream.batch_tokens=100", r"8 lanes do not divide batch_tokens 100"),
        ("stream.max_norm=0.5", r"max_norm is 0\.5, expected above 1"),
        ("optimiser.clip=-1", r"must be positive"),
        ("data.bos=first", r"data.*bos is 'first'"),
        ("tokens=10", r"tokens is 10, expected at least 4096"),
        ("seed=-1", r"seed is -1"),
        ("checkpoint.every=0", r"checkpoint: every is 0, expected at least 1"),
        ("evaluation.every=-3", r"evaluation: every is -3"),
        ("optimiser.clip=nan", r"must be positive"),
        ("objective.k=0", r"topk: k 0"),
        ("objective.k_aux=0", r"k_aux 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(setting, message):
    with pytest.raises(ConfigError, match=message):
        from_table(override(TABLE, [setting]))


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match=r"missing: data\.source"):
        from_table(TABLE | {"data": {}})
    with pytest.raises(ConfigError, match="data: found 'x', expected a table"):
        from_table(TABLE | {"data": "x"})


def test_overrides_are_toml_values_or_text_and_change_nothing_else():
    before = {key: dict(value) for key, value in TABLE.items()}
    table = override(
        TABLE, ["optimiser.lr=1e-4", "sae.hookpoints=['a.1','b']", "model.name=gpt2", "seed = 3"]
    )
    assert table["optimiser"] == {"lr": 1e-4} and table["sae"]["hookpoints"] == ["a.1", "b"]
    assert table["model"]["name"] == "gpt2" and table["seed"] == 3
    assert before == TABLE
    for wrong in ("optimiser.lr", "model.name.x=3"):
        with pytest.raises(ConfigError, match="setting"):
            override(TABLE, [wrong])


def test_an_objective_by_name_alone():
    config = from_table(TABLE | {"objective": "jumprelu"})
    assert isinstance(config.objective, JumpReLUObjective)


def test_transcoders_are_pairs():
    sae = {"hookpoints": ["mlp_in.6->mlp_out.6", "blocks.3.hook_resid_post"]}
    config = from_table(TABLE | {"sae": sae})
    found = [(str(read), str(write)) for read, write in config.sae.pairs()]
    assert found == [("mlp_in.6", "mlp_out.6"), ("resid_post.3", "None")]


def test_no_toml_is_said_so(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("tokens = = 3")
    with pytest.raises(ConfigError, match=r"recipe\.toml"):
        load_table(path)
