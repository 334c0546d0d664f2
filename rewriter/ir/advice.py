"""What a person can do about a refusal: the second half of every near miss.

A refusal says in one sentence what stopped the matcher. This table says what follows from it. The
first entry whose phrase occurs in the reason counts, so special ones stand before general ones.
"""

from __future__ import annotations

NOTHING = (
    "It is no attention, so there is nothing to rewrite and nothing to do; it stays as it is. "
    "on_miss='ignore' keeps `rewrite` from warning."
)
LEAVE = (
    "It is another function than softmax attention, so no mixer can take its place; it stays as "
    "it is."
)
TEACH = (
    "If it changes no value, declare it transparent, and if it is a normaliser of your own, "
    "register it as an anchor (docs/extending.md); else it stays as it is."
)

_TABLE: tuple[tuple[str, str], ...] = (
    ("follows a projection", NOTHING + " Routers, poolings and classifiers look like this."),
    ("largest of some scores", NOTHING + " Top-k gates look like this."),
    (
        "picked by the largest",
        "The core would see tokens that are chosen at run time. Attention before the choice can "
        "be rewritten; this one stays as it is.",
    ),
    ("block by block", "Compute the attention in one piece (switch chunking off) to rewrite it."),
    (
        "not followed by a product with values",
        NOTHING + " If its values are multiplied in another module, give the module that holds "
        "both.",
    ),
    (
        "'mul' stands between the softmax",
        "Probabilities are multiplied after the softmax, so rows no longer sum to 1. If it is a "
        "mask, put it before the softmax: masked_fill(scores, ~mask, -inf); if it is dropout, use "
        "torch.nn.functional.dropout.",
    ),
    (
        "'softmax' stands between",
        "The scores are normalised twice. Remove one softmax if that was not meant.",
    ),
    ("stands between", TEACH),
    (
        "values are summed over another axis",
        "The softmax has to run over the keys that the values are summed over: dim=-1 for scores "
        "(..., queries, keys). If it is meant like this, it stays as it is.",
    ),
    (
        "an axis that queries and keys share",
        "The softmax runs over a batch, head or channel axis. Give it dim=-1 for scores "
        "(..., queries, keys). If it is meant like this, it stays as it is.",
    ),
    ("axis of size 1", NOTHING + " A softmax over one value is 1."),
    ("values depend on the probabilities", LEAVE),
    ("enter more than one product", LEAVE + " Heads that share probabilities look like this."),
    ("multiplied with themselves", LEAVE),
    (
        "two products are added",
        "Scores of two pairs of queries and keys are added, as in disentangled attention. Where "
        "both pairs are known, concatenating them along the channels gives the same in one "
        "product; else it stays as it is.",
    ),
    (
        "several products joined",
        "Join the keys and the values instead of the scores to rewrite it.",
    ),
    (
        "no product of queries and keys is in sight",
        NOTHING + " If the product is in another module, give the module that holds both.",
    ),
    (
        "scaled by something that is no constant",
        "The temperature is computed or learned. Multiply the queries with it before the product "
        "to keep it: then it is part of what stays.",
    ),
    (
        "filled with something that is no constant",
        "Fill with a number, -inf for instance, or add the values as a bias.",
    ),
    ("the scale is no constant", "Multiply the queries with the scale before the call."),
    ("brings hidden keys back", "Apply the soft-cap before the mask."),
    ("runs over the channels", LEAVE),
    ("scaled by a learned factor", "Multiply the scores by the factor before they are masked."),
    ("hidden keys come back", "Scale the scores before the mask, or fill it with -inf."),
    ("computed from the scores themselves", LEAVE + " Gates and thresholds look like this."),
    ("shifted over another axis", LEAVE),
    ("subtracted from the scores", "Add the negated values as a bias to rewrite it."),
    ("before the soft-cap", "Add the constant after the soft-cap, where it changes nothing."),
    ("not normalised by softmax", "Add the constant to the queries or keys, or leave it out."),
    ("added with a factor", "Multiply the mask or bias beforehand and add it without alpha."),
    ("larger than the scores", "Expand the queries to the size of the bias before the product."),
    ("more dimensions than the scores", "Expand the queries before the product."),
    ("the scores are rounded", LEAVE),
    ("probabilities with a sink", "Take the weights of the keys alone after dropping the sink."),
    ("added to the product with the values", "Add it after the product, in an operation apart."),
    ("scaled inside the core", "Scale the output instead of the values, or the projection."),
    ("joined", LEAVE),
    (
        "cannot be told apart",
        "Give example inputs in which batch, heads, tokens and widths are different numbers; "
        "axes of equal size that meet in one reshape cannot be told apart.",
    ),
    ("without a batch or head axis", "Give queries, keys and values a head axis (of size 1)."),
    ("share no channel axis", LEAVE),
    ("different token axes", LEAVE),
    ("lacks an axis of the queries", LEAVE + " Queries that are summed afterwards look like this."),
    ("no multiple of key heads", "Give the keys a divisor of the number of query heads."),
    (
        "times in one forward pass",
        "Give an example call in which the model traces as a whole, then its runs are told apart.",
    ),
    (
        "cannot be traced",
        "Give example inputs that take the intended path, or move what Python decides from "
        "values of tensors out of forward; modules around it are traced alone.",
    ),
)
_GENERAL = (
    "If this is attention, please report it with the graph below; a rule can be added from your "
    "own package too (docs/extending.md)."
)


def advice(reason: str) -> str:
    """What to do about a refusal with this reason."""
    return next((text for phrase, text in _TABLE if phrase in reason), _GENERAL)


def mask_advice(opaque: str) -> str:
    """What to do about a mask that was not understood, for a site that was."""
    if "token values" in opaque:
        return (
            "Only `keep` can serve it, since which keys are visible is decided by the tokens. "
            "Documents packed into one row can be given as a block mask instead."
        )
    if "length was fixed" in opaque:
        return (
            "Only `keep` can serve it as captured. Give example inputs whose length may change, "
            "or make the mask from the length of the input."
        )
    if "between heads or rows" in opaque:
        return "Only `keep` can serve it, since heads or rows see different keys."
    return (
        "Only `keep` can serve it: its pattern is no combination of causal, windows, chunks, "
        "prefixes, documents and padding. Check that the mask is the one you mean: a single "
        "later key that is left visible shows up here too."
    )
