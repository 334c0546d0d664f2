"""Shipped recipes: complete, valid, found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rewriter.distill import load_config, named_config, recipe, recipe_names
from rewriter.errors import InputError, UsageError
from rewriter.mixers.registry import available

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_every_recipe_is_valid_and_says_where_it_is_from() -> None:
    assert recipe_names() == [
        *("demo", "hedgehog", "lit", "lolcats"),
        *("mambainllama", "minilm", "mohawk", "radlads"),
    ]
    for name in recipe_names():
        one = recipe(name)
        assert one.name == name and one.description and one.source
        assert named_config(name) == one.config
        if "meant for " in one.source:
            assert one.source.rpartition("meant for ")[2] in available()


def test_the_demo_recipe_is_the_example() -> None:
    assert named_config("demo") == load_config(EXAMPLES / "demo_distill.yaml")


def test_published_losses_are_those_of_the_recipe() -> None:
    hedgehog, mohawk = recipe("hedgehog").config.layers, recipe("mohawk").config.layers
    assert hedgehog is not None and mohawk is not None
    assert (hedgehog.attention, hedgehog.output) == ("cross_entropy", 0)
    assert (mohawk.attention, mohawk.output) == ("frobenius", 1)


def test_a_file_is_read_and_a_wrong_name_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"layers": {"steps": 3}}), encoding="utf-8")
    assert named_config(path) == load_config(path)
    with pytest.raises(UsageError, match="no recipe 'hedgehogs'; did you mean 'hedgehog'"):
        named_config("hedgehogs")
    with pytest.raises(UsageError, match="no recipe 'x'"):
        recipe("x")
    with pytest.raises(InputError, match=r"no\.yaml"):
        named_config(tmp_path / "no.yaml")
