"""Reference kernel of `LongConv`: FFT over pieces of the text, the recurrence for one token.

Transforms run in float64: in float32 their rounding spreads over all outputs, so that a later token
would change earlier ones by some 1e-6. Phases are reduced to one turn in float64 as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.backends.reference.precision import full_precision, wide
from rewriter.ir.long_conv import LongConv
from rewriter.ir.state import State

PIECE = 1024  # tokens transformed at once; bounds the table of powers


def long_conv(
    spec: LongConv,
    v: Tensor,
    decay: Tensor,
    angle: Tensor,
    read: Tensor,
    *,
    valid: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """See `LongConv`; float32, or float64 where v is."""
    with full_precision(v.device):
        x = wide(v).transpose(2, 3)
        weight = torch.view_as_complex(read.to(x.dtype).contiguous())
        weight = torch.unflatten(weight, 0, (v.shape[1], -1)).transpose(1, 2)
        filtered = _Filter(decay.to(x.dtype), angle.to(x.dtype), weight)
        h = None if state is None else torch.view_as_complex(state["modes"].to(x.dtype))
        outs = []
        for at in range(0, v.shape[2], PIECE):
            stop = min(at + PIECE, v.shape[2])
            shown = None if valid is None else valid[:, at:stop]
            last = stop == v.shape[2] and state is None
            if stop - at == 1 and h is not None:
                out, h = filtered.step(x[..., at:stop], shown, h)
            else:
                out, h = filtered.piece(x[..., at:stop], shown, h, carry=not last)
            outs.append(out)
        out = torch.cat(outs, -1)  # (B, Hkv, Dv, G, n)
        out = out.permute(0, 1, 3, 4, 2).flatten(1, 2).to(v.dtype)
        if state is None:
            return out, None
        assert h is not None
        return out, {"modes": torch.view_as_real(h).float()}


@dataclass(frozen=True)
class _Filter:
    """decay, angle (Hkv, Dv, M), weight (Hkv, Dv, G, M) complex."""

    decay: Tensor
    angle: Tensor
    weight: Tensor

    def step(self, x: Tensor, valid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """One token: x (B, Hkv, Dv, 1), h (B, Hkv, Dv, M)."""
        after = torch.polar(self.decay.exp(), self.angle) * h + x
        out = 2 * (self.weight * after.unsqueeze(-2)).sum(-1, keepdim=True).real
        if valid is None:
            return out, after
        shown = valid[:, :, None, None]
        return out * shown[..., None], torch.where(shown, after, h)

    def piece(
        self, x: Tensor, valid: Tensor | None, h: Tensor | None, carry: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Some tokens, x (B, Hkv, Dv, n): outputs (B, Hkv, Dv, G, n) and the modes behind them.

        Hidden tokens are moved to the front, where they are zeros before the first one; what was
        carried is read by the number of real tokens since.
        """
        n = x.shape[-1]
        powers = _powers(self.decay, self.angle, n + 1)
        order = None if valid is None else valid.long().argsort(dim=1, stable=True)
        if valid is not None and order is not None:
            x = (x * valid[:, None, None]).gather(-1, order[:, None, None].expand_as(x))
        out = _convolved(x.unsqueeze(-2), _real(self.weight) @ powers[..., :n])
        if h is not None:
            late = _real(self.weight * h.unsqueeze(-2)) @ powers[..., 1:]
            if valid is not None and order is not None:
                since = (valid.gather(1, order).cumsum(1) - 1).clamp_min(0)
                late = late.gather(-1, since[:, None, None, None].expand_as(late))
            out = out + late
        if valid is not None and order is not None:
            rank = order.argsort(1)[:, None, None, None].expand_as(out)
            out = out.gather(-1, rank) * valid[:, None, None, None]
        if not carry:
            return out, None
        written = torch.einsum("kdml,bkdl->bkdm", powers[..., :n].flip(-1), x)
        end = torch.complex(*written.chunk(2, -1))
        if h is None:
            return out, end
        passed = h.new_full((x.shape[0],), n).real if valid is None else valid.sum(1)
        steps = passed.to(x.dtype)[:, None, None, None]
        left = torch.polar((steps * self.decay).exp(), _turns(steps, self.angle))
        return out, end + h * left


def _powers(decay: Tensor, angle: Tensor, count: int) -> Tensor:
    """(Hkv, Dv, 2M, count): real parts, then imaginary parts, of z^0 ... z^(count - 1)."""
    steps = torch.arange(count, device=decay.device, dtype=decay.dtype)
    size, phase = (steps * decay[..., None]).exp(), _turns(steps, angle[..., None])
    return torch.cat((size * phase.cos(), size * phase.sin()), -2)


def _turns(steps: Tensor, angle: Tensor) -> Tensor:
    """steps * angle less its whole turns, reduced in float64."""
    whole = steps.double() * angle.double()
    return torch.remainder(whole, 2 * math.pi).to(angle.dtype)


def _real(weight: Tensor) -> Tensor:
    """(..., M) complex to (..., 2M), so that 2 Re sum r z is a product with `_powers`."""
    return torch.cat((2 * weight.real, -2 * weight.imag), -1)


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution over the last axis; leading axes broadcast."""
    n = x.shape[-1]
    size = 2 * n
    product = torch.fft.rfft(x.double(), size) * torch.fft.rfft(kernel.double(), size)
    whole: Tensor = torch.fft.irfft(product, size)
    return whole[..., :n].to(x.dtype)
