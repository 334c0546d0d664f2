"""Linear layers of a graph by `attention_rewriter::linear`, where no gradient is wanted.

The operator measures torch's own code against a generated one for the sizes at hand and runs the
faster; both give the same values with sums in another order, which is checked once per layer shape.
"""

from __future__ import annotations

import torch
from torch import fx

from rewriter.backends.ops.linear import operator, served
from rewriter.passes.compare import max_difference
from rewriter.passes.normalise.ops import value
from rewriter.passes.verify.exact import BOUND

_ROWS = 37


def splice_linears(module: fx.GraphModule) -> int:
    """Replace `aten.linear` in place; returns how many there were. The graph needs no gradient."""
    if torch.is_autocast_enabled("cpu"):
        return 0
    proved: dict[str, bool] = {}
    count = 0
    for node in list(module.graph.find_nodes(op="call_function", target=_LINEAR)):
        tensors = [value(n) if isinstance(n, fx.Node) else None for n in (*node.args, None)[:3]]
        x, weight, bias = tensors
        if x is None or weight is None or weight.dim() != 2 or not served(x, weight, bias):
            continue
        key = f"{tuple(weight.shape)} {weight.dtype} {bias is not None}"
        if key not in proved:
            proved[key] = _same(weight, bias is not None)
        if proved[key]:
            node.target = torch.ops.attention_rewriter.linear.default
            node.args = (*node.args, None)[:3]
            count += 1
    return count


_LINEAR = torch.ops.aten.linear.default


def _same(weight: torch.Tensor, has_bias: bool) -> bool:
    """Whether the operator gives torch's values on random inputs of this layer shape."""
    shape = [int(s) for s in weight.shape]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(_ROWS, shape[1], generator=generator).to(weight.dtype)
    drawn = torch.randn(shape, generator=generator).to(weight.dtype)
    bias = torch.randn(shape[0], generator=generator).to(weight.dtype) if has_bias else None
    with torch.inference_mode(False), torch.no_grad():
        expected = torch.nn.functional.linear(x, drawn, bias)
        got = operator(x, drawn, bias)
    bound = BOUND.get(weight.dtype, 1e-2)
    return max_difference(got, expected) <= bound * float(expected.float().abs().max())
