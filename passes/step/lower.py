"""From the captured graph of a whole model to the instructions of one new token.

The graph is read for a sequence of one token per row: every operation around the attention cores
works token by token, so what it does to one token is what it does to the last one. Sizes are known
numbers then, positions are one input, and masks are not computed at all: a core on the kernel sees
what its site's predicate says, a core that stays in Python gets no mask, and both hold only where
nothing is padded. Whatever does not fit this reading is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rewriter.backends.cpu.build import NoKernel
from rewriter.backends.cpu.step import AttendKernel, attend_kernel
from rewriter.ir.decode import Decode
from rewriter.ir.mask import Causal, KeyPadding, Window
from rewriter.ir.site import AttentionSite
from rewriter.mixers.base import Mixer
from rewriter.mixers.exact.fused import Fused, FusedOptions
from rewriter.mixers.exact.keep import Keep
from rewriter.passes.capture import Captured
from rewriter.passes.match import Match
from rewriter.passes.match.result import Axis, Layout, Operand
from rewriter.passes.step import values as v
from rewriter.passes.step.rules import RULES, SIZES, Emit
from rewriter.passes.step.values import Buffer, Draft, Unknown, UnsupportedStepError, Value, Weight

QUERY: tuple[Axis, ...] = ("batch", "head", "channel")
KEY: tuple[Axis, ...] = ("batch", "kv_head", "channel")
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


@dataclass(frozen=True)
class Template:
    """The captured graph of a model and the attention that was found in it.

    Attributes:
        captured: the whole model, batch and tokens symbolic.
        matches: all sites, in the order they run.
        output: name under which the model returns its one tensor.
    """

    captured: Captured
    matches: tuple[Match, ...]
    output: str


@dataclass(frozen=True)
class Core:
    """A core of the program: its mixer, and the kernel that runs it; None if Python does."""

    mixer: Mixer
    kernel: AttendKernel | None


@dataclass(frozen=True)
class Program:
    """Instructions of one new token of each of `batch` rows, before they have addresses.

    Attributes:
        drafts: in order.
        floats: size of the arena.
        ids, position: where token numbers (batch,) and the position (1,) go.
        result: the output.
        cores: by the number that 'attend' and 'call' carry.
        weights: tensors by the names that the drafts use.
    """

    drafts: tuple[Draft, ...]
    floats: int
    ids: Value
    position: Value
    result: Value
    cores: tuple[Core, ...]
    weights: Mapping[str, torch.Tensor]


def lower(template: Template, model: nn.Module, batch: int) -> Program | str:
    """The program of a model for `batch` rows, or why there is none."""
    try:
        return _Lowering(template, model, batch).run()
    except UnsupportedStepError as error:
        return str(error)


def core_of(model: nn.Module, site: AttentionSite, dtype: torch.dtype) -> Core:
    """The core that serves a site.

    Raises:
        UnsupportedStepError: it cannot be part of a program.
    """
    owner = model.get_submodule(site.fqn)
    mixer = getattr(owner, "core", None)
    if not isinstance(mixer, Mixer):
        raise UnsupportedStepError(f"the attention of '{site.fqn}' was not rewritten")
    plain = not (site.has_bias or site.cross or site.sinks or site.temperature)
    if mixer.layer is None or site.kind != "causal" or not plain:
        raise UnsupportedStepError(f"the attention of '{site.fqn}' is no plain cached attention")
    if not isinstance(mixer, Keep):
        if mixer.needs_hidden:
            raise UnsupportedStepError(f"'{mixer.info.name}' reads what the projections read")
        return Core(mixer, None)
    plain = all(isinstance(a, (Causal, Window, KeyPadding)) for a in site.mask.atoms)
    why = None if plain else "its mask is neither causal nor a window"
    why = why or Fused.refuse(site, FusedOptions())
    if why is not None:
        raise UnsupportedStepError(f"the attention of '{site.fqn}' stays as it is: {why}")
    heads = site.heads
    spec = Decode(heads.key_dim, heads.value_dim, site.scale, site.softcap)
    kernel = attend_kernel(spec, dtype)
    if isinstance(kernel, NoKernel):
        raise UnsupportedStepError(kernel.reason)
    return Core(mixer, kernel)


class _Lowering:
    def __init__(self, template: Template, model: nn.Module, batch: int) -> None:
        self.template, self.model, self.batch = template, model, batch
        self.emit = Emit()
        self.env: dict[fx.Node, Any] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.cores: list[Core] = []
        self.ids = self._pinned((batch, 1), torch.int64)
        self.position = self._pinned((1,), torch.int64)
        graph = template.captured.graph_module.graph
        self.nodes = list(graph.nodes)
        self.tokens = self._token_symbol()
        self.at = {m.nodes.output.node: m for m in template.matches}

    def run(self) -> Program:
        results: Any = self.nodes[-1].args[0]
        if not isinstance(results, Sequence) or len(results) != 1:
            raise UnsupportedStepError("the model returns more than one tensor")
        (output,) = results
        needed = self._needed(output)
        for node in self.nodes:
            if node in needed:
                self.env[node] = self._value(node)
        result = self.env[output]
        if not isinstance(result, Value) or not isinstance(result.base, Buffer):
            raise UnsupportedStepError("the output is not computed")
        result = self.emit.rows(result)
        assert isinstance(result.base, Buffer)
        result.base.pinned = True
        if not self.cores:
            raise UnsupportedStepError("no attention was found between input and output")
        drafts = [
            Draft("copy", x, (x,)) for x in (self.ids, self.position, result)
        ]  # planned first, never run
        floats = v.plan_arena([*drafts[:2], *self.emit.drafts, drafts[2]])
        return Program(
            tuple(self.emit.drafts), floats, self.ids, self.position, result,
            tuple(self.cores), self.weights,
        )  # fmt: skip

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        found = self.emit.new(shape, dtype)
        assert isinstance(found.base, Buffer)
        found.base.pinned = True
        return found

    def _token_symbol(self) -> Any:
        captured = self.template.captured
        for node in self.nodes:
            if node.op == "placeholder" and self._input(node) == IDS:
                size = node.meta["val"].shape[1]
                if isinstance(size, torch.SymInt):
                    return size.node.expr
        where = ", ".join(captured.inputs.values())
        raise UnsupportedStepError(f"no row of tokens of any length is among the inputs ({where})")

    def _input(self, node: fx.Node) -> str | None:
        path = self.template.captured.inputs.get(node.name)
        return None if path is None else path.removeprefix("kwargs.")

    def _needed(self, output: Any) -> set[fx.Node]:
        """Nodes that the output depends on, the inside and the masks of cores left out."""
        needed: set[fx.Node] = set()
        stack = [output]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            match = self.at.get(node)
            if match is None:
                stack += node.all_input_nodes
            else:
                core = match.nodes
                stack += [core.query.node, core.key.node, core.value.node]
        return needed

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node in self.at:
            return self._core(self.at[node])
        target = node.target
        args: Any = fx.map_arg(node.args, self.env.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, self.env.__getitem__)
        name = str(target)
        if name == "aten.sym_size.int":
            return args[0].shape[args[1]]
        if name == "<built-in function getitem>":
            return args[0][args[1]]
        if target in SIZES and all(isinstance(a, int) for a in args):
            return SIZES[target](*args)
        if name.startswith("aten.arange."):
            return self._arange(node, args)
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedStepError(f"the operation {name} (node '{node.name}')")
        if any(isinstance(a, Unknown) for a in node_leaves((args, kwargs))):
            raise UnsupportedStepError(f"node '{node.name}' computes on the mask outside attention")
        meta = node.meta.get("val")
        meta = meta[0] if isinstance(meta, (tuple, list)) else meta
        dtype = meta.dtype if isinstance(meta, torch.Tensor) else torch.float32
        try:
            return rule(self.emit, args, kwargs, dtype)
        except UnsupportedStepError as error:
            raise UnsupportedStepError(f"{error} (node '{node.name}', {name})") from None

    def _placeholder(self, node: fx.Node) -> Any:
        captured = self.template.captured
        given = self._input(node)
        if given == IDS:
            return self.ids
        if given == MASK:
            return Unknown((self.batch, 1))
        if given == POSITIONS:
            return v.expanded(v.unsqueezed(self.position, 0), (self.batch, 1))
        if node.name in captured.parameters:
            name = captured.parameters[node.name]
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(owner), leaf)
        elif node.name in captured.constants:
            name, tensor = f"constant {node.name}", captured.constants[node.name]
        else:
            raise UnsupportedStepError(f"the input '{given}' is unknown to a step")
        if tensor.device.type != "cpu" or tensor.dtype != node.meta["val"].dtype:
            raise UnsupportedStepError(f"'{name}' is not what it was when the model was captured")
        return self._weight(name, tensor)

    def _weight(self, name: str, tensor: torch.Tensor) -> Value:
        if tensor.dtype in (torch.int64, torch.int32) and tensor.numel() <= 4096:
            tensor = tensor.float()  # small tables of numbers, such as positions
        self.weights[name] = tensor
        base = Weight(name, tensor.dtype)
        return Value(base, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def _arange(self, node: fx.Node, args: Sequence[Any]) -> Value:
        size = node.meta["val"].shape[0]
        if isinstance(size, torch.SymInt) and size.node.expr == self.tokens:
            if len(args) > 1 and args[0] != 0:
                raise UnsupportedStepError(f"positions that do not start at 0 ('{node.name}')")
            return self.position
        if not isinstance(size, int):
            raise UnsupportedStepError(f"numbers counted over another size ('{node.name}')")
        bounds = [a for a in args if isinstance(a, (int, float))]
        return self._weight(f"constant {node.name}", torch.arange(*bounds).float())

    def _core(self, match: Match) -> Value:
        heads, nodes = match.site.heads, match.nodes
        query = self._canonical(nodes.query, match.site, QUERY)
        key, value = (self._canonical(x, match.site, KEY) for x in (nodes.key, nodes.value))
        expected = (
            (self.batch, heads.query, heads.key_dim),
            (self.batch, heads.key_value, heads.key_dim),
            (self.batch, heads.key_value, heads.value_dim),
        )
        if (query.shape, key.shape, value.shape) != expected:
            raise UnsupportedStepError(f"the operands of '{match.site.fqn}' have other sizes")
        core = core_of(self.model, match.site, value.dtype)
        out = self.emit.new((self.batch, heads.query, heads.value_dim), value.dtype)
        room = None
        if core.kernel is not None:
            sizes = (self.batch, heads.query, heads.key_dim, heads.value_dim)
            room = Buffer(core.kernel.scratch(*sizes))
        self.cores.append(core)
        self.emit.drafts.append(
            Draft("call" if room is None else "attend", out, (query, key, value),
                  core=len(self.cores) - 1, room=room)
        )  # fmt: skip
        return self._laid_out(out, nodes.output.layout, match.site)

    def _canonical(self, operand: Operand, site: AttentionSite, order: tuple[Axis, ...]) -> Value:
        """The operand as (batch, heads, channel); there is one token."""
        x = self.emit.loaded(self.env[operand.node])
        heads = site.heads
        sizes: dict[Axis, int] = {
            "batch": self.batch,
            "token": 1,
            "head": heads.query,
            "kv_head": heads.key_value,
            "group": heads.group,
            "channel": -1,
        }
        axes: list[Axis] = [axis for dim in operand.layout.dims for axis in dim]
        if "window" in axes:
            raise UnsupportedStepError(f"the attention of '{site.fqn}' is one of windows")
        split = self.emit.reshaped(x, [sizes[a] for a in axes])
        for n in reversed(range(len(axes))):
            if axes[n] == "token":
                split = v.squeezed(split, n)
                del axes[n]
        if "batch" not in axes:
            split = v.unsqueezed(split, 0)
            axes.insert(0, "batch")
        if order == KEY and "kv_head" not in axes:
            if "head" in axes:
                axes[axes.index("head")] = "kv_head"
            else:
                split = v.unsqueezed(split, 1)
                axes.insert(1, "kv_head")
        if order == QUERY and "head" not in axes:
            wanted: tuple[Axis, ...] = ("batch", "kv_head", "group", "channel")
            split = v.permuted(split, [axes.index(a) for a in wanted])
            return self.emit.reshaped(split, (self.batch, heads.query, split.shape[-1]))
        if sorted(axes) != sorted(order):
            raise UnsupportedStepError(f"an operand of '{site.fqn}' lies as {operand.layout.dims}")
        return v.permuted(split, [axes.index(a) for a in order])

    def _laid_out(self, x: Value, layout: Layout, site: AttentionSite) -> Value:
        """(batch, head, channel) in the layout of the graph."""
        heads = site.heads
        axes: list[Axis] = ["batch", "head", "channel"]
        flat = [axis for dim in layout.dims for axis in dim]
        if "group" in flat:
            shape = (self.batch, heads.key_value, heads.group, heads.value_dim)
            x = self.emit.reshaped(x, shape)
            axes = ["batch", "kv_head", "group", "channel"]
        elif "kv_head" in flat:
            axes[1] = "kv_head"
        sizes = dict(zip(axes, x.shape, strict=True)) | {"token": 1}
        x = v.permuted(x, [axes.index(a) for a in flat if a in axes])
        if len([a for a in flat if a in axes]) != len(axes):
            raise UnsupportedStepError(f"the output of '{site.fqn}' lies as {layout.dims}")
        sides: list[int] = []
        for dim in layout.dims:
            size = 1
            for axis in dim:
                size *= sizes[axis]
            sides.append(size)
        return self.emit.reshaped(x, sides)


def node_leaves(value: Any) -> list[Any]:
    """Everything inside nested tuples, lists and mappings."""
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in node_leaves(item)]
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in node_leaves(item)]
    return [value]
