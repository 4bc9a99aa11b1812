"""Ready configurations that ship with the package."""

from __future__ import annotations

from importlib import resources

from dp_federated_lora.errors import ConfigError


def recipe_names() -> dict[str, str]:
    """Name and one-line description (its first comment) of each recipe."""
    folder = resources.files("dp_federated_lora.lab") / "recipes"
    files = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
    return {
        name.removesuffix(".toml"): (folder / name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name in files
    }


def recipe_text(name: str) -> str:
    """The commented configuration of a recipe.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; choose one of {list(recipe_names())}")
    return (resources.files("dp_federated_lora.lab") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
