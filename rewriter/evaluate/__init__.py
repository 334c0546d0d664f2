"""Evaluation: what a rewrite costs in quality, with intervals and branch ablation."""

from rewriter.evaluate.ablation import branch_ablation, branches_of, without_branch
from rewriter.evaluate.encoder import SimilarityAgreement, embed, similarity_agreement
from rewriter.evaluate.harness import harness
from rewriter.evaluate.masked import masked_accuracy
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
from rewriter.evaluate.recall import lists, recall
from rewriter.evaluate.report import QualityReport
from rewriter.evaluate.sentences import SENTENCES
from rewriter.evaluate.speed import speed
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
    "harness",
    "kl_to_teacher",
    "lists",
    "masked_accuracy",
    "measure",
    "measure_branches",
    "passkey",
    "perplexity",
    "ratio",
    "recall",
    "similarity_agreement",
    "speed",
    "teacher_gap",
    "top1_agreement",
    "without_branch",
]
