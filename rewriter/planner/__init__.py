"""Choose a mixer for every site under a budget: measured quality against cost."""

from rewriter.planner.knapsack import Choice, cheapest_choice, knapsack
from rewriter.planner.objective import Objective, Probes, Score
from rewriter.planner.retrieval import HeadScores, head_scores
from rewriter.planner.search import SearchOptions, SearchResult, search
from rewriter.planner.space import Candidate, SearchSpace, open_space

__all__ = [
    "Candidate",
    "Choice",
    "HeadScores",
    "Objective",
    "Probes",
    "Score",
    "SearchOptions",
    "SearchResult",
    "SearchSpace",
    "cheapest_choice",
    "head_scores",
    "knapsack",
    "open_space",
    "search",
]
