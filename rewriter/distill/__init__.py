"""Distillation: a rewritten model learns from the original."""

from rewriter.distill.config import (
    DistillConfig,
    LayerStage,
    LogitStage,
    LongStage,
    load_config,
    parse_config,
)
from rewriter.distill.data import Corpus, Rows, packed_corpus, padded_corpus, read_texts
from rewriter.distill.progress import LiveProgress, PlainLines, Progress, Reporter, Silent
from rewriter.distill.recipe import Recipe, named_config, recipe, recipe_names
from rewriter.distill.run import DistillResult, distill

__all__ = [
    "Corpus",
    "DistillConfig",
    "DistillResult",
    "LayerStage",
    "LiveProgress",
    "LogitStage",
    "LongStage",
    "PlainLines",
    "Progress",
    "Recipe",
    "Reporter",
    "Rows",
    "Silent",
    "distill",
    "load_config",
    "named_config",
    "packed_corpus",
    "padded_corpus",
    "parse_config",
    "read_texts",
    "recipe",
    "recipe_names",
]
