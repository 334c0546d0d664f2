"""Checkpoints: reading what exists, writing what was rewritten, and loading it again."""

from rewriter.checkpoint.load import is_rewritten, load
from rewriter.checkpoint.read import Source, open_checkpoint
from rewriter.checkpoint.write import save

__all__ = ["Source", "is_rewritten", "load", "open_checkpoint", "save"]
