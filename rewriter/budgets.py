"""A budget instead of rules: what one forward or the cache may cost. Plain data; `rewriter.planner`
turns it into a plan."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from rewriter.errors import UsageError

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*x")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|kB|MB|GB)?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s)?")
_UNITS = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}


def size_in_bytes(text: str) -> int:
    """'8 GB', '500 MiB', '4096' as bytes.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is no size; write '8 GB', '500 MiB' or a number of bytes")
    return int(float(match[1]) * _UNITS.get(match[2] or "", 1.0))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limit(_Strict):
    """`amount` seconds or bytes, or `share` of what the exact model takes."""

    amount: float | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0)

    def of(self, exact: float) -> float:
        """The limit, where the exact model takes `exact`."""
        if self.amount is not None:
            return self.amount
        assert self.share is not None
        return self.share * exact


class Choice(_Strict):
    """A mixer that a site may get.

    Attributes:
        use: mixer name.
        options: its options.
    """

    use: str
    options: dict[str, Any] = Field(default_factory=dict)


WINDOW = Choice(use="sink_window", options={"window": 64, "sinks": 4})


class Budget(_Strict):
    """What may be spent; exactly one of `latency` and `memory`.

    Attributes:
        latency: of one forward of `context` tokens: seconds, '40 ms', or '0.5x' of the time with
            exact attention in every layer.
        memory: bytes of the cache of `batch` rows at `context`: a number, '20 MiB', or '0.25x'.
        phase: which forward `latency` means: a prefill of `context` tokens, or one new token.
        context: tokens.
        batch: rows.
        choices: mixers besides the exact one.
        exact: the mixer of the original function that full layers run.
        never: site numbers that keep the exact mixer; integers, negative from the end.
        kinds: at most so many different mixers in the plan, the exact one included.
        bounded: only mixers whose cache does not grow, outside of `never`.
        device: 'here', the name of a device, or a profile file.
        dtype: of the model when it runs.
        steps, trials, draws: how long to search; see `SearchOptions`.
    """

    latency: Limit | None = None
    memory: Limit | None = None
    phase: Literal["prefill", "decode"] = "prefill"
    context: int = Field(default=4096, ge=1)
    batch: int = Field(default=1, ge=1)
    choices: tuple[Choice, ...] = (WINDOW,)
    exact: Literal["fused", "keep"] = "fused"
    never: tuple[StrictInt, ...] = ()
    kinds: int | None = Field(default=None, ge=1)
    bounded: bool = False
    device: str = "here"
    dtype: str = "float32"
    steps: int = Field(default=0, ge=0)
    trials: int = Field(default=120, ge=0)
    draws: int = Field(default=8, ge=1)

    @field_validator("latency", "memory", mode="before")
    @classmethod
    def _as_limit(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value
        text = str(value).strip()
        if match := _SHARE.fullmatch(text):
            return {"share": float(match[1])}
        pattern = _TIME if info.field_name == "latency" else _SIZE
        if match := pattern.fullmatch(text):
            return {"amount": float(match[1]) * _UNITS.get(match[2] or "", 1.0)}
        examples = "0.5, '40 ms' or '0.5x'" if info.field_name == "latency" else "'20 MiB', '0.25x'"
        raise ValueError(f"'{text}' is no {info.field_name}; write {examples}")

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if (self.latency is None) == (self.memory is None):
            raise ValueError(
                "give one of 'latency' and 'memory'; 'bounded: true' limits the growth of the "
                "cache beside a latency"
            )
        if not self.choices:
            raise ValueError("'choices' names no mixer to choose from")
        return self

    @property
    def limit(self) -> Limit:
        found = self.latency or self.memory
        assert found is not None
        return found

    def describe(self) -> str:
        """'prefill of 8192 tokens at most 0.5 x of the exact model'."""
        what = f"{'prefill of' if self.phase == 'prefill' else 'token behind'} {self.context}"
        if self.memory is not None:
            what = f"cache of {self.context} tokens"
        limit = self.limit
        if limit.share is not None:
            return f"{what}: at most {limit.share:g} x that of the exact model"
        return f"{what}: at most {limit.amount:g} {'bytes' if self.memory else 's'}"


def budget(**fields: Any) -> Budget:
    """A budget from its fields: `budget(latency="0.5x", context=8192)`, `budget(memory="20 MiB")`.

    Raises:
        UsageError: the fields do not make one; the message names the field.
    """
    from pydantic import ValidationError

    from rewriter.documents import Document, explain

    try:
        return Budget.model_validate(fields)
    except ValidationError as error:
        raise explain(error, Document("budget", fields), Budget) from None
