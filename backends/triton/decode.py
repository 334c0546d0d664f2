"""The raw decode kernels of the Triton backend; interface: `backends/inputs.py`.

Not yet timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.inputs import DecodeInputs
from rewriter.backends.triton.attention_call import Args
from rewriter.backends.triton.chunks import block, dense, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch, Runner, execute, unavailable
from rewriter.backends.triton.targets import DTYPES, Target, config, target_of
from rewriter.ir.decode import Decode

# Programs that keep a large GPU busy, and the most parts one row is cut into.
_PROGRAMS, _MOST_PARTS = 256, 64


def decline(spec: Decode, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why these kernels cannot serve a spec, or None if they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not {dtype}"
    if needs_grad:
        return "decode kernels have no backward pass"
    if max(spec.key_dim, spec.value_dim) > 256:
        return "head dims above 256 do not fit the registers of one program"
    return None


def forward(
    spec: Decode, x: DecodeInputs, run: Runner = execute, target: Target | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, n, Dv) in the dtype of v and the log-sum-exp (B, H, n), float32.

    Args:
        run, target: replaced to compile for a GPU that is not there.
    """
    target = target or target_of(x.q.device)
    B, H, n, _ = x.q.shape
    k, v = dense(x.k), dense(x.v)
    kv_heads = k.shape[1]
    rows = H // kv_heads * n
    capacity = k.shape[2]
    if x.pages is not None:
        capacity = x.pages.shape[1] * spec.page
    if x.index is not None:
        capacity = x.index.shape[2]
    four = v.dtype == torch.float32
    chosen = config("decode", target, max(spec.key_dim, spec.value_dim), four)
    blocks = -(-capacity // chosen.keys)
    splits = max(1, min(blocks, _MOST_PARTS, -(-_PROGRAMS // (B * kv_heads))))
    share = -(-blocks // splits) * chosen.keys
    tile = block(rows, chosen.rows)
    part = torch.empty((B, H, n, splits, spec.value_dim), dtype=torch.float32, device=v.device)
    part_lse = torch.empty((B, H, n, splits), dtype=torch.float32, device=v.device)
    out = v.new_empty((B, H, n, spec.value_dim))
    lse = v.new_empty((B, H, n), dtype=torch.float32)
    module = emit(
        "decode",
        cache=spec.cache,
        softcap=spec.softcap,
        sinks=x.sinks is not None,
        lengths=x.lengths is not None,
        precision="ieee",
    )
    constants = {
        "DK": spec.key_dim,
        "DV": spec.value_dim,
        "BD": block(spec.key_dim, 256),
        "BE": block(spec.value_dim, 256),
        "R": tile,
        "BN": chosen.keys,
        **({"PAGE": spec.page} if x.pages is not None else {}),
    }
    run(
        Launch(
            module.split,
            (splits, B * kv_heads, -(-rows // tile)),
            {
                "q": x.q.contiguous(),
                "k": k,
                "v": v,
                "part": part,
                "part_lse": part_lse,
                **_where(x),
                **strides("k", k),
                **strides("v", v),
                "kv_heads": kv_heads,
                "tokens": n,
                "rows": rows,
                "capacity": capacity,
                "share": share,
                "splits": splits,
                "scale": spec.scale,
            },
            constants,
            chosen.warps,
            chosen.stages,
        )
    )
    run(
        Launch(
            module.merge,
            (B * H * n,),
            {
                "part": part,
                "part_lse": part_lse,
                **({} if x.sinks is None else {"sinks": x.sinks.contiguous()}),
                "out": out,
                "lse": lse,
                "heads": H,
                "tokens": n,
                "splits": splits,
            },
            {"DV": spec.value_dim, "BE": constants["BE"], "BS": max(2, _power(splits))},
        )
    )
    return out, lse


def _where(x: DecodeInputs) -> Args:
    """What says which keys there are, by parameter name."""
    out: Args = {}
    if x.lengths is not None:
        out["lengths"] = x.lengths.to(torch.int32).contiguous()
    if x.pages is not None:
        out["pages"] = x.pages.to(torch.int32).contiguous()
        out["P"] = x.pages.shape[1]
    if x.index is not None:
        out["index"] = x.index.to(torch.int32).contiguous()
    return out


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
