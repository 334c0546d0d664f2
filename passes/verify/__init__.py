"""Verification: the contracts of the design, run on the person's own model on every rewrite."""

from rewriter.passes.verify.channel import MlpProof, prove_mlps
from rewriter.passes.verify.contracts import Level, verify
from rewriter.passes.verify.proof import SiteProof, prove_sites

__all__ = ["Level", "MlpProof", "SiteProof", "prove_mlps", "prove_sites", "verify"]
