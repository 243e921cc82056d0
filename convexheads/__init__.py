"""Few-shot classification heads whose base learner is a convex problem.

A head is used in two lines: `head = SVMHead(C=0.1)`, then `logits = head(support, labels, query)`.

Kernels are reached as `convexheads.kernels.RBF`, other solvers as `convexheads.solvers.QpthSolver`, backbones as
`convexheads.models.Conv4`, and adapters to other libraries by importing a module of `convexheads.integrations`.
"""

# Modules by their own name, so that type checkers know them as attributes.
from convexheads import heads as heads
from convexheads import kernels as kernels
from convexheads import models as models
from convexheads import solvers as solvers
from convexheads.episodes import Episode, split_task
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError, SolverError, SolverWarning
from convexheads.evaluation import Evaluation, calibrate, embed, evaluate
from convexheads.heads import (
    CvxpyHead,
    GaussianProcessHead,
    Head,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestHead,
    PrototypeHead,
    RegressionHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SupportVectorRegressionHead,
    SVMHead,
    WestonWatkinsHead,
)
from convexheads.hyperparameters import Learnable
from convexheads.kernels import RBF, Constant, Cosine, Kernel, Linear, Polynomial, Product, Sum
from convexheads.loader import EpisodeLoader
from convexheads.models import list_pretrained, load_pretrained, metaoptnet_ridge, metaoptnet_svm, protonet, r2d2
from convexheads.solvers import NativeSolver

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (by subject)
    # classification
    "Head",
    "SVMHead",
    "WestonWatkinsHead",
    "OneVsRestHead",
    "SimplifiedSVMHead",
    "LogisticHead",
    "RidgeHead",
    "PrototypeHead",
    "LinearDiscriminantHead",
    "MahalanobisHead",
    "CvxpyHead",
    # regression
    "RegressionHead",
    "RidgeRegressionHead",
    "GaussianProcessHead",
    "SupportVectorRegressionHead",
    # hyperparameters and solvers
    "Learnable",
    "NativeSolver",
    # episodes
    "Episode",
    "EpisodeLoader",
    "Evaluation",
    "calibrate",
    "embed",
    "evaluate",
    "split_task",
    # settings of the literature and trained weights
    "metaoptnet_ridge",
    "metaoptnet_svm",
    "protonet",
    "r2d2",
    "list_pretrained",
    "load_pretrained",
    # errors
    "ConvexHeadsError",
    "InputError",
    "MissingDependencyError",
    "SolverError",
    "SolverWarning",
    # kernels
    "RBF",
    "Constant",
    "Cosine",
    "Kernel",
    "Linear",
    "Polynomial",
    "Product",
    "Sum",
]
