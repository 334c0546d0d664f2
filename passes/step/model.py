"""A model whose calls with one new token run as a compiled step, once that has been checked.

The model's class becomes a dynamic subclass of itself whose `forward` looks at the call: one new
token per row behind a filled cache, nothing padded, no gradients, nothing about the modules changed
since the rewrite. Such a call runs as a program; every other one as before. The first calls of each
kind run both ways, and unless the logits agree the program is never used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from rewriter.backends.registry import allowed
from rewriter.errors import RewriterError
from rewriter.mixers.base import Mixer
from rewriter.mixers.exact.keep import Keep
from rewriter.passes.capture import Captured
from rewriter.passes.examples import examples_for
from rewriter.passes.find import find
from rewriter.passes.match import Match
from rewriter.passes.realise.original import original_of
from rewriter.passes.realise.owner import ReEmitted
from rewriter.passes.realise.subclass import InPlace, become
from rewriter.passes.step.guard import Guard
from rewriter.passes.step.lower import Template, lower
from rewriter.passes.step.machine import Machine, machine

STATE = "_compiled_step"
PATIENCE = 16  # tokens that a model without a template decodes before one is made
CHECKS = 2  # calls of a kind that run both ways before the program is trusted
# Largest difference of a logit from the module's, in units of the largest logit (at least 1).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
_SIMPLE = (str, int, float, bool, type(None))


class Decoding:
    """The compiled step of one model."""

    def __init__(
        self,
        template: Template | None,
        guard: Guard | None,
        reason: str | None = None,
        later: bool = False,
    ):
        """Args:
        later: the template is made once `PATIENCE` tokens were decoded without it.
        """
        self.template, self.guard, self.reason, self.later = template, guard, reason, later
        self.waited = 0
        self.machines: dict[int, Machine] = {}
        self.checked: dict[Any, int] = {}
        self.kinds: dict[Any, type] = {}
        self.ran = 0  # calls that ran as a program alone

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoding:
        guard = copy.deepcopy(self.guard, memo)
        return Decoding(self.template, guard, self.reason, self.later)

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoding, (None, None, "the model was unpickled, and graphs do not pickle")

    def describe(self) -> str:
        """One sentence about how single tokens run."""
        if self.reason is not None:
            return f"module by module: {self.reason}"
        if self.template is None:
            return f"module by module for {PATIENCE} tokens, then a step is made"
        done = [n for n in self.checked.values() if n >= CHECKS]
        if not done:
            return "as a compiled step, which is checked when the first tokens are decoded"
        sizes = ", ".join(map(str, sorted(self.machines)))
        return f"as a compiled step (batch {sizes}), equal to the modules on the first tokens"

    def step(self, model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
        """The output of a call, or None where the modules have to run."""
        unmade = self.template is None and not self.later
        if unmade or self.guard is None or torch.is_grad_enabled():
            return None
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if type(ids) is not torch.Tensor or not isinstance(cache, Cache):
            return None
        if ids.dim() != 2 or ids.shape[1] != 1 or isinstance(cache, EncoderDecoderCache):
            return None
        if ids.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not cache.layers:
            return None
        seen, batch = int(cache.get_seq_length()), int(ids.shape[0])
        kind = _kind(model, kwargs, seen, batch)
        if seen == 0 or kind is None or not self.guard.holds():
            return None
        if self.template is None and not self._made(model):
            return None
        assert self.template is not None
        if self.guard.moved():
            self.machines.clear()
            self.checked.clear()
        found = self.machines.get(batch) or self._machine(model, batch)
        if found is None:
            return None
        if self.checked.get((batch, kind), 0) < CHECKS:
            return self._check(model, found, kwargs, seen, (batch, kind))
        logits = found.run(ids, seen, cache)
        if logits is None:
            return None
        self.ran += 1
        return self.kinds[batch, kind](**{self.template.output: logits, "past_key_values": cache})

    def _made(self, model: nn.Module) -> bool:
        """Make the template if enough tokens were decoded for it to pay."""
        self.waited += 1
        if self.waited <= PATIENCE:
            return False
        self.later = False
        with torch.inference_mode(False), torch.no_grad():
            found = _template(model)
        if isinstance(found, str):
            self._give_up(found)
            return False
        self.template = found
        return True

    def _machine(self, model: nn.Module, batch: int) -> Machine | None:
        assert self.template is not None
        if not allowed("cpu"):
            return None
        program = lower(self.template, model, batch)
        found = program if isinstance(program, str) else machine(program)
        if isinstance(found, str):
            self._give_up(found)
            return None
        self.machines[batch] = found
        return found

    def _check(
        self, model: nn.Module, found: Machine, kwargs: Mapping[str, Any], seen: int, key: Any
    ) -> Any:
        """Run the program beside the modules; the modules' output is what counts."""
        assert self.template is not None
        cache = kwargs["past_key_values"]
        beside = copy.copy(cache)
        beside.layers = list(cache.layers)
        for layer in found.python_layers():
            if layer < len(beside.layers):
                beside.layers[layer] = copy.deepcopy(beside.layers[layer])
        logits = found.run(kwargs["input_ids"], seen, beside, advance=False)
        for slot in found.slots:  # a layer that was put in place beside holds the same tokens
            index = slot.core.mixer.layer
            if logits is not None and index is not None:
                cache.layers[index] = beside.layers[index]
        output = plain_forward(model)(**kwargs)
        if logits is None:
            return output
        name = self.template.output
        given = {k for k, v in output.items() if v is not None} if _is_output(output) else set()
        if given != {name, "past_key_values"} or output["past_key_values"] is not cache:
            self.checked[key] = -(10**9)  # never, for calls of this kind
            return output
        expected = output[name]
        if expected.shape != logits.shape or expected.dtype not in TOLERANCE:
            self._give_up("it returns something else than the model")
            return output
        worst = float((expected.float() - logits.float()).abs().max())
        size = max(1.0, float(expected.abs().max()))
        if not worst <= TOLERANCE[expected.dtype] * size:
            self._give_up(f"its logits differ from those of the modules by {worst:.2g}")
            return output
        self.checked[key] = self.checked.get(key, 0) + 1
        self.kinds[key] = type(output)
        return output

    def _give_up(self, reason: str) -> None:
        self.reason, self.template = reason, None
        self.machines.clear()


def attach(model: nn.Module, captured: Captured, matches: Sequence[Match]) -> None:
    """Let a rewritten model decode by a compiled step where that is possible.

    Args:
        model: the result of a rewrite; its class changes to a subclass of itself.
        captured: the graph of the whole original model.
        matches: all attention found in it.
    """
    found = _unfit(model) or _fitting(model, captured, matches)
    reason = found if isinstance(found, str) else None
    template = None if isinstance(found, str) else found
    _put(model, Decoding(template, Guard.of(model), reason))


def attach_later(model: nn.Module) -> None:
    """As `attach` for a model whose graph is not at hand: a loaded one, or one made from a plan.

    The original is captured when `PATIENCE` tokens were decoded, since that takes seconds.
    """
    reason = _unfit(model)
    _put(model, Decoding(None, Guard.of(model), reason, later=reason is None))


def _put(model: nn.Module, decoding: Decoding) -> None:
    model.__dict__[STATE] = decoding
    if decoding.reason is None:
        become(model, Stepping)


def _template(model: nn.Module) -> Template | str:
    """The template of a rewritten model, from its original made again, or why there is none."""
    plain = _original(model)
    try:
        found = find(plain, examples_for(plain))
    except RewriterError as error:
        return str(error)
    if found.graph is None:
        return "the model does not trace as a whole"
    return _fitting(model, found.graph.captured, found.graph.matches)


def _original(model: nn.Module) -> nn.Module:
    """The original of a model that steps."""
    state = model.__dict__.pop(STATE)
    kind = type(model)
    try:
        model.__class__ = kind.__bases__[1]
        return original_of(model)
    finally:
        model.__class__ = kind
        model.__dict__[STATE] = state


def _fitting(model: nn.Module, captured: Captured, matches: Sequence[Match]) -> Template | str:
    cores = [m for m in model.modules() if isinstance(m, Mixer)]
    if len({m.site.fqn for m in matches}) != len(cores):
        return "some of its attention was not rewritten"
    names = [] if captured.out_spec is None else captured.out_spec.context
    if not isinstance(names, list) or len(names) != 1:
        return "the model returns something else than one named tensor"
    return Template(captured, tuple(matches), str(names[0]))


def decoding_of(model: nn.Module) -> str:
    """How single tokens of a model run: as a compiled step or module by module, and why."""
    state = model.__dict__.get(STATE)
    if not isinstance(state, Decoding):
        return "module by module: no step was prepared for this model"
    return state.describe()


def _unfit(model: nn.Module) -> str | None:
    cores = [m for m in model.modules() if isinstance(m, Mixer)]
    if isinstance(model, ReEmitted):
        return "the model is one attention block"
    if all(isinstance(c, Keep) and type(c) is Keep for c in cores):
        return "nothing was rewritten, so every bit is kept"
    if not any(c.layer is not None for c in cores):
        return "the model keeps no cache"
    if next(model.parameters()).device.type != "cpu":
        return "the model is not on the CPU"
    return None


# What a config may ask for, other than by the call.
_ASKED = ("output_attentions", "output_hidden_states", "use_cache", "return_dict")


def _kind(model: nn.Module, kwargs: Mapping[str, Any], seen: int, batch: int) -> Any:
    """Everything about a call that is not a token, a cache or a trivial mask; None: not trivial."""
    config = getattr(model, "config", None)
    rest: list[tuple[str, Any]] = [(f"config {n}", getattr(config, n, None)) for n in _ASKED]
    for name, value in kwargs.items():
        if name in ("input_ids", "past_key_values"):
            continue
        if isinstance(value, torch.Tensor):
            if name == "attention_mask":
                fits = value.shape == (batch, seen + 1) and bool(value.all())
            elif name in ("position_ids", "cache_position"):
                fits = value.shape[-1] == 1 and bool((value == seen).all())
            else:
                fits = False
            if not fits:
                return None
        elif isinstance(value, _SIMPLE):
            rest.append((name, value))
        else:
            return None
    return tuple(sorted(rest, key=lambda item: item[0]))


def _is_output(output: Any) -> bool:
    return isinstance(output, Mapping) and hasattr(output, "to_tuple")


class Stepping(InPlace):
    """Mixin of models with a compiled step."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and not torch.compiler.is_compiling():
            found = self.__dict__[STATE].step(self, kwargs)
            if found is not None:
                return found
        return plain_forward(self)(*args, **kwargs)


def plain_forward(model: nn.Module) -> Any:
    """The forward of the model's own class, also if others were put in front since."""
    own: Any = super(Stepping, model)
    return own.forward
