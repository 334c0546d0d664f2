"""Recipes: shipped settings of published distillations, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from rewriter.distill.config import DistillConfig, load_config, parse_config
from rewriter.documents import did_you_mean
from rewriter.errors import UsageError

RECIPE_FOLDER = Path(__file__).parent / "recipes"


class Recipe(BaseModel):
    """A named preset.

    Attributes:
        name: what `--config` takes.
        description: what it does, and what of the published steps it does not.
        source: paper or repository.
        config: the settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    source: str
    config: DistillConfig


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def recipe(name: str) -> Recipe:
    """A shipped recipe.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in recipe_names():
        raise UsageError(f"there is no recipe '{name}'{did_you_mean(name, recipe_names())}")
    path = RECIPE_FOLDER / f"{name}.yaml"
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = parse_config(data["config"], f"the recipe '{name}'")
    return Recipe.model_validate({**data, "name": name, "config": config})


def named_config(source: str | Path) -> DistillConfig:
    """The settings of a recipe by its name, or of a file.

    Raises:
        InputError: the file cannot be read.
        UsageError: no recipe has that name, or the file is not a valid config.
    """
    text = str(source)
    if text in recipe_names():
        return recipe(text).config
    path = Path(text)
    known = path.suffix.lower() in (".yaml", ".yml", ".json")
    if not (known or len(path.parts) > 1 or path.exists()):
        raise UsageError(
            f"there is no recipe '{text}'{did_you_mean(text, recipe_names())} (or give the path "
            "of a YAML or JSON file)"
        )
    return load_config(path)
