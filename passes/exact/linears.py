"""Linear layers on whichever code is faster: found in the graph, proved alone, changed in place.

A layer is a module without children whose part of the graph is one product by its own parameter
and changes of layout. It becomes an instance of a dynamic subclass of its own class: keys,
parameters and hooks stay; only `forward` is new.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from rewriter.backends import fastest
from rewriter.backends.cpu import linear as generated
from rewriter.backends.ops.linear import linear
from rewriter.errors import UsageError
from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.capture import Captured
from rewriter.passes.compare import max_difference
from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.noops import is_noop
from rewriter.passes.normalise.ops import op, operand
from rewriter.passes.provenance import call_number, module_path
from rewriter.passes.realise.subclass import InPlace, become
from rewriter.plan import LinearLayer

STATE = "_linear_layer"
PROBED_ROWS = (1, 64, 1024)
Run = Callable[[torch.Tensor], torch.Tensor]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_LAYOUT = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "sym_size", "t"})


@dataclass(frozen=True)
class Form:
    """How a module computes its layer.

    Attributes:
        weight, bias: names of its parameters.
        transposed: the weight is stored as (in, out).
    """

    weight: str
    bias: str | None
    transposed: bool

    def run(self, owner: nn.Module, x: torch.Tensor, product: Any) -> torch.Tensor:
        weight = getattr(owner, self.weight)
        bias = None if self.bias is None else getattr(owner, self.bias)
        out: torch.Tensor = product(x, weight.t() if self.transposed else weight, bias)
        return out


def find(captured: Captured, model: nn.Module) -> list[LinearLayer]:
    """Every linear layer of a captured model, with what will be done about it and why.

    A layer is planned where generated code was measured to be faster for some number of rows and
    gives the same outputs and gradients; else it is refused with the reason.
    """
    view = View(captured)
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in view.graph.nodes:
        if node.op == "call_function":
            groups[module_path(node)].append(node)
    proofs: dict[Any, str | tuple[float, dict[str, float]]] = {}
    found = []
    for path, nodes in groups.items():
        owner = model.get_submodule(path)
        products = [n for n in nodes if view.linear(n) is not None]
        if not products or next(owner.children(), None) is not None:
            continue  # products of modules with children are left as they are
        form = _form(owner, nodes, products, view)
        if isinstance(form, str):
            found.append(LinearLayer(fqn=path, status="refused", reason=form))
            continue
        weight = getattr(owner, form.weight)
        key = (type(owner), form, weight.shape, weight.dtype, owner.training)
        if key not in proofs:
            proofs[key] = _proof(owner, form)
        proof = proofs[key]
        if isinstance(proof, str):
            found.append(LinearLayer(fqn=path, status="refused", reason=proof))
            continue
        error, gains = proof
        found.append(LinearLayer(fqn=path, **asdict(form), error=error, gains=gains))
    return found


def apply(model: nn.Module, layers: Sequence[LinearLayer]) -> None:
    """Put the planned layers of a model on the faster code, in place.

    Raises:
        UsageError: the model has no such layer.
    """
    for layer in layers:
        if layer.status == "refused":
            continue
        try:
            owner = model.get_submodule(layer.fqn)
            weight = getattr(owner, layer.weight)
        except AttributeError:
            raise UsageError(
                f"the plan names the linear layer '{layer.fqn}' with the parameter "
                f"'{layer.weight}', which this model does not have; make a new plan for it"
            ) from None
        if weight.dim() != 2 or type(owner).forward is FasterLinear.forward:
            raise UsageError(f"'{layer.fqn}' is no linear layer that can be changed")
        owner.__dict__[STATE] = Form(layer.weight, layer.bias, layer.transposed)
        become(owner, FasterLinear)


def results(model: nn.Module, layers: Sequence[LinearLayer]) -> list[ContractResult]:
    """Contracts 8 and 10 of the layers that were changed: largest error, measured gains."""
    done = [x for x in layers if x.status != "refused"]
    if not done:
        return []
    worst = max(done, key=lambda x: x.error)
    dtype = getattr(model.get_submodule(worst.fqn), worst.weight).dtype
    check = "linear layers: outputs and gradients equal the original"
    gains = (
        f"{rows} rows: {median(all_):.2f}x in {len(all_)}"
        for rows in map(str, PROBED_ROWS)
        if (all_ := [x.gains[rows] for x in done if rows in x.gains])
    )
    return [
        judged(8, check, worst.fqn, worst.error, BOUND[dtype], f"{len(done)} layers"),
        ContractResult(
            10, "linear layers: measured gain", "model", "reported", detail=", ".join(gains)
        ),
    ]


class FasterLinear(InPlace):
    """Mixin of all changed layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # An exported graph stays in ATen, so that it can be matched again and runs anywhere.
        if len(args) != 1 or kwargs or torch.compiler.is_exporting():
            return super().forward(*args, **kwargs)
        form: Form = self.__dict__[STATE]
        return form.run(self, args[0], linear)


def _form(
    owner: nn.Module, nodes: Sequence[fx.Node], products: Sequence[fx.Node], view: View
) -> Form | str:
    """The one linear layer that a module is, or why it is none."""
    if len({call_number(n) for n in products}) != len(products):
        return "it holds several products"
    strange = next((n for n in nodes if n not in products and not _is_layout(n)), None)
    if strange is not None:
        return f"it computes more than a product ('{op(strange) or strange.name}')"
    named = dict(owner.named_parameters(recurse=False))
    used = _parameter(products[0], view)
    weight = next((name for name, p in named.items() if p is used and p.dim() == 2), None)
    if weight is None:
        return "its weight is no matrix of its own"
    rest = [name for name in named if name != weight]
    if len(rest) > 1 or next(owner.buffers(), None) is not None:
        return "it has more than a weight and a bias"
    if "forward" in owner.__dict__ or owner._forward_hooks or owner._forward_pre_hooks:
        return "its forward is hooked"
    kind = next((type(p) for p in named.values() if type(p) is not nn.Parameter), None)
    if kind is not None:
        return f"its parameters are of the type {kind.__name__}"
    matrix = named[weight]
    if matrix.device.type != "cpu" or matrix.dtype not in generated.NAMES:
        return f"there is no generated code for {matrix.dtype} on {matrix.device.type}"
    return _oriented(owner, weight, rest[0] if rest else None)


def _parameter(product: fx.Node, view: View) -> torch.Tensor | None:
    found = view.linear(product)
    node = None if found is None else found.weight
    while node is not None and node.op == "call_function":
        node = operand(node)
    return None if node is None else view.captured.parameter(node.name)


def _is_layout(node: fx.Node) -> bool:
    return is_noop(node) or permutation(node) is not None or op(node) in _LAYOUT


def _oriented(owner: nn.Module, weight: str, bias: str | None) -> Form | str:
    """With the weight as it is stored or transposed: whichever gives the module's outputs."""
    matrix = getattr(owner, weight)
    for form in (Form(weight, bias, False), Form(weight, bias, True)):
        x = _input(matrix.shape[0 if form.transposed else 1], matrix.dtype, 3)
        try:
            with torch.no_grad():
                if _error(form.run(owner, x, F.linear), owner(x)) <= BOUND[matrix.dtype]:
                    return form
        except RuntimeError:  # shapes of the other orientation
            continue
    return "its parameters do not give its outputs as a plain linear layer"


def _proof(owner: nn.Module, form: Form) -> str | tuple[float, dict[str, float]]:
    """Largest relative error of outputs and gradients and the measured gains, or a refusal."""
    stored = getattr(owner, form.weight)
    weight = stored.t() if form.transposed else stored
    gains: dict[str, float] = {}
    for rows in PROBED_ROWS:
        seconds = fastest.seconds(weight, rows)
        if fastest.is_better(seconds):
            gains[str(rows)] = round(seconds[1] / seconds[0], 2)
    if not gains:
        return "generated code was not measured to be faster on this machine"
    worst = 0.0
    for rows in (2, 19):
        x = _input(weight.shape[1], weight.dtype, rows)
        with torch.no_grad():
            worst = max(worst, _error(form.run(owner, x, generated.forward), owner(x)))
        ours = _gradients(owner, x, lambda leaf: form.run(owner, leaf, linear))
        theirs = _gradients(owner, x, owner)
        worst = max(worst, *(_error(a, b) for a, b in zip(ours, theirs, strict=True)))
    if not worst <= BOUND[weight.dtype]:
        return f"generated code differs by {worst:.2g} from the original"
    return worst, gains


def _input(width: int, dtype: torch.dtype, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 1, width, generator=generator).to(dtype)


@torch.enable_grad()
def _gradients(owner: nn.Module, x: torch.Tensor, run: Run) -> list[torch.Tensor]:
    """Output and the gradients of input and parameters, for a fixed cotangent."""
    leaf = x.clone().requires_grad_()
    out = run(leaf)
    wanted = [leaf, *(p for p in owner.parameters() if p.requires_grad)]
    cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    if a.shape != b.shape:
        return float("inf")
    return max_difference(a, b) / max(1e-6, float(b.float().abs().max()))
