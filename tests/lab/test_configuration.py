import tomllib
from pathlib import Path

import pytest

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.config import Config, load_config, parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.recipes import recipe_names, recipe_text
from dp_federated_lora.lab.statement import state_privacy
from dp_federated_lora.lab.workbench import unit_notes
from dp_federated_lora.privacy import Spend

Raw = dict[str, dict[str, object]]


def refused(raw: Raw) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, where="test.toml")
    return str(caught.value)


def test_a_possible_configuration_survives_the_round_trip_through_toml(raw_config: Raw, tmp_path: Path):
    config = parse_config(raw_config, where="test.toml")
    (tmp_path / "again.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize("name", list(recipe_names()))
def test_every_recipe_is_a_possible_configuration(name: str, tmp_path: Path):
    (tmp_path / "r.toml").write_text(recipe_text(name), encoding="utf-8")
    assert load_config(tmp_path / "r.toml").privacy.epsilon == 8.0


def test_the_example_is_the_newswire_recipe():
    example = Path(__file__).parents[2] / "examples" / "newswire.toml"
    assert example.read_text(encoding="utf-8") == recipe_text("newswire")


def test_the_example_of_digits_is_a_possible_configuration():
    example = load_config(Path(__file__).parents[2] / "examples" / "digits.toml")
    assert (example.data.image_column, example.privacy.epsilon) == ("image", 8.0)


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="newswire"):
        recipe_text("nope")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("privacy", "epsilom", 3.0, "privacy.epsilom: unknown key"),
        ("privacy", "epsilon", 10.5, "allow_weak_privacy"),
        ("privacy", "delta", 1e-4, "allow_weak_privacy"),
        ("privacy", "epsilon", -1.0, "privacy.epsilon"),
        ("privacy", "epsilon", float("nan"), "privacy.epsilon"),
        ("privacy", "sampling_rate", 0.0, "privacy.sampling_rate"),
        ("privacy", "sampling_rate", "0.1", "privacy.sampling_rate"),
        ("privacy", "trust", "nobody", "privacy.trust"),
        ("privacy", "population", None, "never counted from private data"),
        ("method", "name", "flora", "is no sum"),
        ("method", "name", "fedex", "is no sum"),
        ("method", "name", "hetlora", 'use trust = "local"'),
        ("method", "name", "fedavgg", "unknown method"),
        ("federation", "ranks", [{"clients": 3, "rank": 2}], "must add up to federation.clients"),
        ("federation", "ranks", [{"clients": 4, "rank": 1}], "the largest must be lora.rank"),
        ("federation", "ranks", [{"clients": 4, "rank": 0}], "federation.ranks.0.rank"),
        ("data", "test_is_public", False, "data.test_is_public"),
        ("data", "labels", [], "public list of labels"),
        ("training", "local_steps", 3, "takes one noised step"),
        ("federation", "columns", ["author"], "federation.columns"),
        ("run", "secret", 1, "run.secret: unknown key"),
    ],
)
def test_impossible_settings_name_the_key_and_the_reason(raw_config: Raw, section: str, key: str, value: object, message: str):
    raw_config.setdefault(section, {})[key] = value
    if value is None:
        del raw_config[section][key]
    text = refused(raw_config)
    assert message in text
    assert "test.toml" in text


def test_weak_privacy_needs_its_switch(raw_config: Raw):
    raw_config["privacy"] |= {"epsilon": 20.0, "allow_weak_privacy": True}
    assert parse_config(raw_config, where="x").privacy.epsilon == 20.0


def test_client_unit_needs_local_steps_and_its_population_is_the_number_of_clients(client_config: Raw):
    assert parse_config(client_config, where="x").population == 4
    client_config["privacy"]["population"] = 99
    assert "federation.clients" in refused(client_config)
    del client_config["privacy"]["population"], client_config["training"]["local_steps"]
    assert "needs all three" in refused(client_config)


def test_language_modelling_has_no_labels_and_no_split_by_label(raw_config: Raw):
    raw_config["model"]["task"] = "causal-lm"
    text = refused(raw_config)
    assert "has no labels" in text
    assert "splits by label" in text


def test_all_problems_are_reported_at_once_and_a_missing_section_too(raw_config: Raw):
    raw_config["privacy"] |= {"epsilon": 20.0, "delta": 0.1}
    assert refused(raw_config).count("allow_weak_privacy") == 2
    del raw_config["lora"]
    assert "lora: missing" in refused(raw_config)


def test_adam_has_no_momentum_setting(raw_config: Raw):
    raw_config["training"] |= {"server_optimizer": "adam", "server_momentum": 0.5}
    assert "server_momentum" in refused(raw_config)


def written(path: Path, raw: Raw) -> Path:
    path.write_text(parse_config(raw, where="x").to_toml(), encoding="utf-8")
    return path


def test_overrides_take_toml_values_and_bare_words(raw_config: Raw, tmp_path: Path):
    path = written(tmp_path / "c.toml", raw_config)
    config = load_config(path, overrides=["privacy.epsilon=3.0", "method.name=fedavg", "lora.targets=['key']"])
    assert (config.privacy.epsilon, config.method.name, config.lora.targets) == (3.0, "fedavg", ("key",))
    for wrong in ("epsilon=3", "privacy.epsilon", "a.b.c=1"):
        with pytest.raises(ConfigError, match=r"section\.key=value"):
            load_config(path, overrides=[wrong])


def test_unreadable_and_malformed_files_say_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[model", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml")
    (tmp_path / "flat.toml").write_text("model = 3", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a section"):
        load_config(tmp_path / "flat.toml", overrides=["model.task=causal-lm"])


def test_where_results_go_does_not_change_the_identity_of_a_configuration(raw_config: Raw):
    first = parse_config(raw_config, where="x")
    raw_config["run"]["out"] = "elsewhere"
    assert parse_config(raw_config, where="x").content_id == first.content_id
    raw_config["privacy"]["clip_norm"] = 2.0
    assert parse_config(raw_config, where="x").content_id != first.content_id


def test_configurations_are_frozen(raw_config: Raw):
    config: Config = parse_config(raw_config, where="x")
    with pytest.raises(Exception, match="frozen"):
        config.privacy.epsilon = 1.0  # type: ignore[misc]


def test_the_statement_says_what_an_example_is_where_texts_are_cut():
    raw = tomllib.loads(recipe_text("dialogue"))
    assert unit_notes(parse_config(raw, where="x")) == ()
    raw["privacy"] |= {"unit": "example", "population": 50_000}
    raw["training"] = {}
    config = parse_config(raw, where="x")
    rows = state_privacy(privacy_plan(config), spend=Spend(1.0, 1e-5, 1, 1), insecure=False, notes=unit_notes(config))
    covered = [row for row in rows if row.epsilon is not None]
    assert covered
    assert all(any("at most 32 tokens" in assumption for assumption in row.assumptions) for row in covered)


def test_a_configuration_of_an_earlier_version_keeps_its_id():
    """A run is resumed, and a study's result found again, by it: a new key that is not set must not change it."""
    raw = {
        "model": {"source": "builtin:random-vit", "task": "classification"},
        "lora": {"targets": ["query"]},
        "data": {"train": "train.csv", "label_column": "y", "labels": ["a", "b"], "image_column": "x"},
        "federation": {"clients": 2},
        "privacy": {"unit": "example", "epsilon": 1.0, "sampling_rate": 0.5, "rounds": 2, "population": 10},
        "run": {"out": "out"},
    }
    expected = "a002a315931f6707c48b0fcc1ab15fb511e96ae0f442510e22783ba357e00cb5"
    assert parse_config(raw, where="test").content_id == expected
