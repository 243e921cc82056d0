"""Few-shot classification heads whose base learner is a convex problem.

Two lines: `head = SVMHead(C=0.1)`, then `logits = head(support, labels, query)`.
"""

from convexheads.episodes import Episode, split_task
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError, SolverError, SolverWarning
from convexheads.evaluation import Evaluation, calibrate, embed, evaluate
from convexheads.heads import (
    CvxpyHead,
    CvxpyTask,
    Dual,
    Fitted,
    FittedGaussianProcess,
    FittedRegression,
    GaussianProcessHead,
    Head,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    MulticlassSVM,
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
from convexheads.models.presets import metaoptnet_ridge, metaoptnet_svm, protonet, r2d2
from convexheads.models.pretrained import Pretrained, list_pretrained, load_pretrained
from convexheads.solvers import (
    QP,
    CvxpylayersSolver,
    MoreauSolver,
    NativeSolver,
    QpthSolver,
    Solution,
    Solved,
    Solver,
    Status,
)

__version__ = "0.1.0"

__all__ = [
    "QP",
    "RBF",
    "Constant",
    "ConvexHeadsError",
    "Cosine",
    "CvxpyHead",
    "CvxpyTask",
    "CvxpylayersSolver",
    "Dual",
    "Episode",
    "EpisodeLoader",
    "Evaluation",
    "Fitted",
    "FittedGaussianProcess",
    "FittedRegression",
    "GaussianProcessHead",
    "Head",
    "InputError",
    "Kernel",
    "Learnable",
    "Linear",
    "LinearDiscriminantHead",
    "LogisticHead",
    "MahalanobisHead",
    "MissingDependencyError",
    "MoreauSolver",
    "MulticlassSVM",
    "NativeSolver",
    "OneVsRestHead",
    "Polynomial",
    "Pretrained",
    "Product",
    "PrototypeHead",
    "QpthSolver",
    "RegressionHead",
    "RidgeHead",
    "RidgeRegressionHead",
    "SVMHead",
    "SimplifiedSVMHead",
    "Solution",
    "Solved",
    "Solver",
    "SolverError",
    "SolverWarning",
    "Status",
    "Sum",
    "SupportVectorRegressionHead",
    "WestonWatkinsHead",
    "calibrate",
    "embed",
    "evaluate",
    "list_pretrained",
    "load_pretrained",
    "metaoptnet_ridge",
    "metaoptnet_svm",
    "protonet",
    "r2d2",
    "split_task",
]
