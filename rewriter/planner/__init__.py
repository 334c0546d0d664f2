"""Choose a mixer for every site under a budget: measured quality against cost."""

from rewriter.planner.budgeting import BudgetResult, plan_under
from rewriter.planner.device import Device
from rewriter.planner.knapsack import Choice, cheapest_choice, knapsack
from rewriter.planner.objective import Objective, Probes, Score
from rewriter.planner.predict import Prediction, Use, predict
from rewriter.planner.retrieval import HeadScores, head_scores
from rewriter.planner.search import SearchOptions, SearchResult, search
from rewriter.planner.sensitivity import Sensitivities, sensitivities
from rewriter.planner.space import Candidate, SearchSpace, open_space
from rewriter.planner.trunk import Trunk, trunk_of

__all__ = [
    "BudgetResult",
    "Candidate",
    "Choice",
    "Device",
    "HeadScores",
    "Objective",
    "Prediction",
    "Probes",
    "Score",
    "SearchOptions",
    "SearchResult",
    "SearchSpace",
    "Sensitivities",
    "Trunk",
    "Use",
    "cheapest_choice",
    "head_scores",
    "knapsack",
    "open_space",
    "plan_under",
    "predict",
    "search",
    "sensitivities",
    "trunk_of",
]
