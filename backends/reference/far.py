"""The linear recurrence S_t = S_{t-1} + f(k_t) [v_t, 1]^T in chunks, with its read f(q_t) S.

The last column of S, fed by the constant 1, is the normaliser (ones-column form), so one product
writes both and one product reads both. Inside a chunk the weights f(q).f(k) are formed directly;
between chunks the state carries. No decay, hence no exponent anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK = 64


def with_ones(v: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[v, 1] in float32, zero at padding. v (B, Hkv, n, Dv), valid (B | 1, n) or None."""
    out = F.pad(v.float(), (0, 1), value=1.0)
    return out if valid is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def scan(
    fq: torch.Tensor,
    fk: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor | None,
    *,
    inclusive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read and write the state token by token.

    Args:
        fq: (B, H, n, m) mapped queries. fk: (B, Hkv, n, m) mapped keys.
        values: (B, Hkv, n, Dv + 1), from `with_ones`.
        start: (B, Hkv, m, Dv + 1) float32 state before the first token, or None for zero.
        inclusive: token t reads the state with key t (else without it).

    Returns:
        (B, H, n, Dv + 1) reads and the state after the last token, float32.
    """
    B, H, n, m = fq.shape
    Hkv, width = fk.shape[1], values.shape[-1]
    G = H // Hkv
    fq, fk = fq.float(), fk.float()
    if start is None:
        start = values.new_zeros(B, Hkv, m, width)
    if n == 1:
        end = start + fk.transpose(-1, -2) * values
        state = end if inclusive else start
        return (fq.view(B, Hkv, G, m) @ state).view(B, H, 1, width), end

    C = min(CHUNK, n)
    count = -(-n // C)
    tail = count * C - n
    fk = F.pad(fk, (0, 0, 0, tail)).view(B, Hkv, count, C, m)
    values = F.pad(values, (0, 0, 0, tail)).view(B, Hkv, count, C, width)
    fq = F.pad(fq, (0, 0, 0, tail)).reshape(B, Hkv, G, count, C, m).transpose(2, 3)
    fq = fq.reshape(B, Hkv, count, G * C, m)

    written = fk.transpose(-1, -2) @ values
    states = torch.cat((start[:, :, None], written), 2).cumsum(2)
    weight = (fq @ fk.transpose(-1, -2)).view(B, Hkv, count, G, C, C)
    weight = weight.tril(0 if inclusive else -1).view(B, Hkv, count, G * C, C)
    out = fq @ states[:, :, :-1] + weight @ values
    out = out.view(B, Hkv, count, G, C, width).transpose(2, 3)
    # The copy frees the states between the chunks.
    return out.reshape(B, H, count * C, width)[:, :, :n], states[:, :, -1].clone()


def total(fq: torch.Tensor, fk: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Bidirectional read: every query reads the sum over all keys. Returns (B, H, n, Dv + 1)."""
    B, H, n, m = fq.shape
    Hkv = fk.shape[1]
    state = fk.float().transpose(-1, -2) @ values
    return (fq.float().reshape(B, Hkv, -1, m) @ state).view(B, H, n, -1)


def normalise(read: torch.Tensor) -> torch.Tensor:
    """Divide by the ones column; a query that reads nothing gives 0."""
    mass = read[..., -1:]
    return read[..., :-1] / torch.where(mass > 0, mass, 1.0)
