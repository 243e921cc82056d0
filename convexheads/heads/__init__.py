"""Few-shot heads, one file a base learner."""

from convexheads.heads.base import Dual, Fitted, Head
from convexheads.heads.prototype import PrototypeHead
from convexheads.heads.ridge import RidgeHead
from convexheads.heads.svm import SVMHead

__all__ = ["Dual", "Fitted", "Head", "PrototypeHead", "RidgeHead", "SVMHead"]
