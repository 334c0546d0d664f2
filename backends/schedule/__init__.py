"""Block schedules: which key blocks each query block visits, and which of them need no mask."""

from rewriter.backends.schedule.blocks import Schedule, Work, schedule, transpose, work

__all__ = ["Schedule", "Work", "schedule", "transpose", "work"]
