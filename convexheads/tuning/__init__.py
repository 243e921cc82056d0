"""Tuning: all tasks, values of hyperparameters and folds of cross-validation solved in one batch."""

from convexheads.tuning.result import Tuned
from convexheads.tuning.search import TunedHead, tune

__all__ = ["Tuned", "TunedHead", "tune"]
