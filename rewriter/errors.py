"""The errors a person sees: one clear sentence (what, where, what to do) and an exit code.

Inside the pipeline failures are values (`NearMiss`, `Refusal`, `ContractResult`); these exceptions
are raised only at the edge, and the command line turns each into its exit code.
"""

from __future__ import annotations

from typing import ClassVar


class RewriterError(Exception):
    """Base of every error this package raises on purpose.

    The message is one sentence that says what is wrong, where, and what to do about it.
    """

    exit_code: ClassVar[int] = 1


class UsageError(RewriterError):
    """A request that cannot be carried out as written: policy, plan, option or mixer name."""

    exit_code = 2


class InputError(RewriterError):
    """A checkpoint, tokenizer or text that cannot be read or is not what it claims to be."""

    exit_code = 3


class NoSiteError(RewriterError):
    """The model has no attention that was understood, or fewer sites than the policy demands."""

    exit_code = 4


class VerificationError(RewriterError):
    """A contract failed on the person's own model."""

    exit_code = 5


class OutputError(RewriterError):
    """The result cannot be written: disk full, target not writable, target already there."""

    exit_code = 6


class UnsupportedError(RewriterError):
    """The rewritten model was asked for something it cannot do, such as cropping a state."""

    exit_code = 7
