"""Name a pointwise function by comparing it with a table on probe values.

Functions of the table differ by far more than `TOLERANCE` somewhere in the probe range (exact and
tanh GELU, the closest pair, by 5e-4), so equality on a few thousand values names one. A function
that equals none is opaque; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from rewriter.ir.mlp import OPAQUE, Activation

Unary = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE = 1e-6  # relative to 1 + |f|; rounded constants such as 0.7978846 stay within it
ENOUGH = 32  # fewer probe values could agree by accident


def _laplace(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


KNOWN: Mapping[str, Unary] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "log_sigmoid": F.logsigmoid,
    "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    "laplace": _laplace,
    "square": torch.square,
    "abs": torch.abs,
    "exp": torch.exp,
    "sin": torch.sin,
    "identity": lambda x: x,
}
"""Functions without parameters, the usual ones first. Opaque is not among them."""

FAMILIES: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "swish": lambda x, beta: x * torch.sigmoid(beta * x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": lambda x, alpha: F.celu(x, alpha) if alpha > 0 else x,
    "clamped": lambda x, limit: x.clamp(-abs(limit), abs(limit)),
    "softplus": lambda x, beta: F.softplus(x, beta) if beta > 0 else x,
}
"""Functions of one constant, tried with every constant that occurs in the region."""
PARAMETER: Mapping[str, str] = {
    "swish": "beta",
    "leaky_relu": "slope",
    "elu": "alpha",
    "celu": "alpha",
    "clamped": "limit",
    "softplus": "beta",
}


def function(activation: Activation) -> Unary:
    """The function of one argument that a name stands for, its scale aside.

    Raises:
        KeyError: the activation is opaque, or takes gate and up projection together.
    """
    if activation.name in FAMILIES and activation.parameters:
        constant = activation.parameters[PARAMETER[activation.name]]
        family = FAMILIES[activation.name]
        return lambda x: family(x, constant)
    return KNOWN[activation.name]


def clamped_gate(
    gate: torch.Tensor, up: torch.Tensor, limit: float, beta: float, shift: float
) -> torch.Tensor:
    """SwiGLU with its inputs clamped: g sigmoid(beta g) (u + shift), g <= limit, |u| <= limit."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(beta * gate) * (up + shift)


def apply(activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The hidden values: f(up), f(gate) * up, or the two-argument function.

    Raises:
        KeyError: the activation is opaque.
    """
    if activation.name == "swiglu_clamped" and gate is not None:
        p = activation.parameters
        out = clamped_gate(gate, up, p["limit"], p["beta"], p["shift"])
    elif gate is not None:
        out = function(activation)(gate) * up
    else:
        out = function(activation)(up)
    return out if activation.scale == 1.0 else out * activation.scale


def name_plain(x: torch.Tensor, y: torch.Tensor, constants: tuple[float, ...]) -> Activation:
    """The name of f with y = c f(x); 'opaque' if there is none in the table."""
    if x.numel() >= ENOUGH:
        for name, parameters, f in _candidates(constants):
            scale = _fits(f(x), y)
            if scale is not None:
                return Activation(name, parameters, scale)
    return Activation(OPAQUE)


def name_gated(
    a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, constants: tuple[float, ...]
) -> tuple[Activation, bool]:
    """The name of f with y = c f(gate) up, and whether `a` is the gate (else `b` is)."""
    if y.numel() < ENOUGH:
        return Activation(OPAQUE), True
    for name, parameters, f in _candidates(constants):
        for gate, up, first in ((a, b, True), (b, a, False)):
            scale = _fits(f(gate) * up, y)
            if scale is not None:
                return Activation(name, parameters, scale), first
    betas = (1.0, *constants)
    for limit in constants:
        for beta in betas:
            for shift in (0.0, 1.0):
                for gate, up, first in ((a, b, True), (b, a, False)):
                    if limit > 0 and _fits(clamped_gate(gate, up, limit, beta, shift), y) == 1.0:
                        found = {"limit": limit, "beta": beta, "shift": shift}
                        return Activation("swiglu_clamped", found), first
    return Activation(OPAQUE), True


def _candidates(constants: tuple[float, ...]) -> Iterator[tuple[str, dict[str, float], Unary]]:
    for name, f in KNOWN.items():
        yield name, {}, f
    for name, family in FAMILIES.items():
        for constant in constants:
            yield name, {PARAMETER[name]: constant}, _bound(family, constant)


def _bound(family: Callable[[torch.Tensor, float], torch.Tensor], constant: float) -> Unary:
    return lambda x: family(x, constant)


def _fits(expected: torch.Tensor, y: torch.Tensor) -> float | None:
    """The constant c with y = c * expected, or None."""
    if not bool(torch.isfinite(expected).all()):
        return None
    largest = expected.abs().argmax()
    if expected[largest] == 0:
        return None
    scale = float(y[largest] / expected[largest])
    if scale == 0.0:
        return None
    scale = 1.0 if abs(scale - 1.0) < TOLERANCE else scale
    error = (y - scale * expected).abs() / (1.0 + y.abs())
    return scale if float(error.max()) <= TOLERANCE else None
