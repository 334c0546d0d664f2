"""`Decode`: softmax attention of the newest tokens against a cache that is bound by bandwidth.

Each key and value is read once for all query heads of its group; the cache is split over the
threads and the parts are merged by their log-sum-exp. Catalogue: sparse.md section 1 (K3, K4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cache = Literal["contiguous", "ring", "paged", "gathered"]


@dataclass(frozen=True)
class Decode:
    """What the kernel computes. Inputs of a call:

    - q: (B, H, n, Dk), the n newest tokens, n <= 16.
    - k, v: (B, Hkv, S, D) slots that hold the n new keys too; paged: (pages, Hkv, page, D).
    - lengths: optional (B,) int32, keys seen so far with the n new ones, default S; not 'gathered'.
    - pages: (B, P) int32, the page of each run of `page` keys; 'paged'.
    - index: (B, Hkv, L) int32 slots to read, -1 at the end; 'gathered'.
    - sinks: (H,) float32.

    Key t of a row lies in slot t (contiguous), t % S (ring; the last min(length, S) keys are
    visible, so n is 1) or page t // page, row t % page (paged). Of n new tokens, token r sees the
    keys t <= length - n + r. Gathered slots are all visible to all n tokens.

    Returned: (B, H, n, Dv) and the log-sum-exp (B, H, n) float32; 0 and -inf for a row without
    keys, so that disjoint parts can be merged.

    Attributes:
        key_dim, value_dim: Dk and Dv.
        scale: of the dot product.
        softcap: or None.
        sinks: the call has `sinks`, (H,) float32 logits of a key with value 0.
        cache: where the keys lie.
        page: keys in a page; 0 unless paged.
    """

    key_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    sinks: bool = False
    cache: Cache = "contiguous"
    page: int = 0

    def __post_init__(self) -> None:
        if (self.page > 0) != (self.cache == "paged"):
            raise ValueError("a page size belongs to a paged cache, and to nothing else")
