"""Few-shot heads that solve a convex problem for each task, and are differentiated through its solution.

Two lines: `head = SVMHead(C=0.1)`, then `logits = head(support, labels, query)`. Kernels are in `convexheads.kernels`,
solvers in `convexheads.solvers`, heads with the settings of the literature in `convexheads.presets`.
"""

from convexheads import kernels, presets, solvers
from convexheads.episodes import calibrate, embed, evaluate, split_task
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError, SolverError, SolverWarning
from convexheads.heads import (
    ClassificationHead,
    CvxpyHead,
    GaussianProcessHead,
    Head,
    KernelExpansion,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RegressionHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SupportSet,
    SupportVectorRegressionHead,
    SVMHead,
    WestonWatkinsSVMHead,
)
from convexheads.hyperparameters import Learnable, parameter_groups
from convexheads.loader import EpisodeLoader
from convexheads.pretrained import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "ClassificationHead",
    "ConvexHeadsError",
    "CvxpyHead",
    "EpisodeLoader",
    "GaussianProcessHead",
    "Head",
    "InputError",
    "KernelExpansion",
    "Learnable",
    "LinearDiscriminantHead",
    "LogisticHead",
    "MahalanobisHead",
    "MissingDependencyError",
    "OneVsRestSVMHead",
    "PrototypeHead",
    "RegressionHead",
    "RidgeHead",
    "RidgeRegressionHead",
    "SVMHead",
    "SimplifiedSVMHead",
    "SolverError",
    "SolverWarning",
    "SupportSet",
    "SupportVectorRegressionHead",
    "WestonWatkinsSVMHead",
    "calibrate",
    "embed",
    "evaluate",
    "kernels",
    "load_pretrained",
    "parameter_groups",
    "presets",
    "solvers",
    "split_task",
]
