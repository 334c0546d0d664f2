"""The compiled step: one new token of a whole model as a list of instructions without Python."""

from rewriter.passes.step.model import attach, attach_later, decoding_of

__all__ = ["attach", "attach_later", "decoding_of"]
