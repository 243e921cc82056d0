"""Few-shot classification heads whose base learner is a convex problem.

Two lines: `head = SVMHead(C=0.1)`, then `logits = head(support, labels, query)`.
"""

from importlib.metadata import version

from convexheads.episodes import Episode, Evaluation, embed, evaluate, split_task
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError, SolverError, SolverWarning
from convexheads.heads import Dual, Fitted, Head, PrototypeHead, RidgeHead, SVMHead
from convexheads.hyperparameters import Learnable
from convexheads.kernels import RBF, Cosine, Kernel, Linear, Polynomial
from convexheads.solvers import QP, CvxpylayersSolver, NativeSolver, QpthSolver, Solution, Solver, Status

__version__ = version("convexheads")

__all__ = [
    "QP",
    "RBF",
    "ConvexHeadsError",
    "Cosine",
    "CvxpylayersSolver",
    "Dual",
    "Episode",
    "Evaluation",
    "Fitted",
    "Head",
    "InputError",
    "Kernel",
    "Learnable",
    "Linear",
    "MissingDependencyError",
    "NativeSolver",
    "Polynomial",
    "PrototypeHead",
    "QpthSolver",
    "RidgeHead",
    "SVMHead",
    "Solution",
    "Solver",
    "SolverError",
    "SolverWarning",
    "Status",
    "embed",
    "evaluate",
    "split_task",
]
