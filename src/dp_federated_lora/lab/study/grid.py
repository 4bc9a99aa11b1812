"""The cells of a study: which recipes with which changes, declared in one TOML file.

Each `[[block]]` becomes one table: `recipe` (a name, or the path of a configuration) with the changes of `set` and without the
keys of `without`; `across` lists values of keys, all combinations of which are run, each `repeats` times with fresh noise and
fresh samples. Partition and frozen factors come from the public seed and stay. `baseline` names what is measured in place of
`dpfl train`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final

from pydantic import Field, ValidationError

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.config import Config, load_config, parse_config
from dp_federated_lora.lab.recipes import recipe_text
from dp_federated_lora.lab.sections import Count, Section

BUILT_IN: Final = "study.toml"


class Block(Section):
    """One table of a study."""

    title: str
    recipe: str
    baseline: Literal["probe", "not-private"] | None = None
    set: Mapping[str, Any] = Field(default_factory=dict)
    without: Annotated[tuple[str, ...], Field(strict=False)] = ()
    across: Mapping[str, Annotated[tuple[Any, ...], Field(min_length=1, strict=False)]] = Field(default_factory=dict)
    repeats: Count = 1


class Grid(Section):
    """All tables of a study."""

    block: Annotated[tuple[Block, ...], Field(min_length=1, strict=False)]


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Args:
        block: title of its table.
        recipe: what was changed.
        settings: its values of the keys that the table varies.
        baseline: what is measured in place of a run.
        config: the whole configuration.
        repeat: 0-based number among equal runs.
    """

    block: str
    recipe: str
    settings: dict[str, Any]
    baseline: str | None
    config: Config
    repeat: int

    @property
    def name(self) -> str:
        """File name of its result: the same cell, whatever table it stands in, is run once."""
        return f"{Path(self.recipe).stem}-{self.baseline or self.config.method.name}-{self.config.content_id[:16]}-{self.repeat}"


def read_grid(path: Path | None = None) -> list[Cell]:
    """The cells of a file, or of the study that ships with the package.

    Raises:
        ConfigError: if the file cannot be read, or a cell is not possible; names the table and the keys.
    """
    where = str(path or BUILT_IN)
    try:
        file = path or resources.files("dp_federated_lora.lab.study") / BUILT_IN
        grid = Grid.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the study {where}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{where} is no study: {error}") from error
    return [cell for block in grid.block for cell in _cells(block, where)]


def _cells(block: Block, where: str) -> Iterator[Cell]:
    recipe = _recipe(block.recipe)
    for values in product(*block.across.values()):
        raw, settings = deepcopy(recipe), dict(zip(block.across, values, strict=True))
        for key in block.without:
            section, _, name = key.partition(".")
            raw.get(section, {}).pop(name, None)
        for key, value in {**block.set, **settings}.items():
            section, _, name = key.partition(".")
            raw.setdefault(section, {})[name] = value
        config = parse_config(raw, where=f"{where}, table {block.title!r}, {settings}")
        for repeat in range(block.repeats):
            yield Cell(block.title, block.recipe, settings, block.baseline, config, repeat)


def _recipe(name: str) -> dict[str, Any]:
    """A configuration as nested dictionaries, by the name of a recipe or by its path."""
    if name.endswith(".toml"):
        return load_config(name).model_dump(mode="json", exclude_none=True)
    return tomllib.loads(recipe_text(name))
