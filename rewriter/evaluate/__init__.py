"""Evaluation: what a rewrite costs in quality, with intervals and branch ablation."""

from rewriter.evaluate.ablation import branch_ablation, branches_of, without_branch
from rewriter.evaluate.encoder import SimilarityAgreement, embed, similarity_agreement
from rewriter.evaluate.measurement import Measurement, ratio
from rewriter.evaluate.quality import (
    TeacherGap,
    copy_perplexity,
    kl_to_teacher,
    passkey,
    perplexity,
    teacher_gap,
    top1_agreement,
)
from rewriter.evaluate.report import QualityReport
from rewriter.evaluate.sentences import SENTENCES
from rewriter.evaluate.suite import SuiteOptions, measure, measure_branches

__all__ = [
    "SENTENCES",
    "Measurement",
    "QualityReport",
    "SimilarityAgreement",
    "SuiteOptions",
    "TeacherGap",
    "branch_ablation",
    "branches_of",
    "copy_perplexity",
    "embed",
    "kl_to_teacher",
    "measure",
    "measure_branches",
    "passkey",
    "perplexity",
    "ratio",
    "similarity_agreement",
    "teacher_gap",
    "top1_agreement",
    "without_branch",
]
