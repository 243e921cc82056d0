"""Few-shot heads that solve a convex problem for each task, and are differentiated through its solution.

Using a head takes two lines: `head = SVMHead(C=0.1)`, then `logits = head(support, labels, query)`.

Kernels are in `convexheads.kernels`, solvers in `convexheads.solvers`, and backbones and heads with published settings
in `convexheads.models`. For an adapter to another library, import its module from `convexheads.integrations`.
"""

# Each module is imported under its own name, so that type checkers treat it as a public attribute.
from convexheads import heads as heads
from convexheads import kernels as kernels
from convexheads import models as models
from convexheads import solvers as solvers
from convexheads.calibration import calibrate
from convexheads.episodes import split_task
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError, SolverError, SolverWarning
from convexheads.evaluation import embed, evaluate
from convexheads.heads import (
    ClassificationHead,
    CvxpyHead,
    GaussianProcessHead,
    Head,
    KernelExpansion,
    LinearDiscriminantHead,
    LogisticHead,
    LossHead,
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
from convexheads.hyperparameters import Learnable, PerTask, parameter_groups
from convexheads.loader import EpisodeLoader
from convexheads.models import list_pretrained, load_pretrained
from convexheads.precision import use_float32
from convexheads.tuning import Tuned, TunedHead, tune

__version__ = "0.1.0"

__all__ = ["OneVsRestSVMHead", "SVMHead", "SimplifiedSVMHead", "WestonWatkinsSVMHead"]
__all__ += ["CvxpyHead", "LinearDiscriminantHead", "LogisticHead", "MahalanobisHead", "PrototypeHead", "RidgeHead"]
__all__ += ["GaussianProcessHead", "RidgeRegressionHead", "SupportVectorRegressionHead"]
__all__ += ["ClassificationHead", "Head", "KernelExpansion", "LossHead", "RegressionHead", "SupportSet"]
__all__ += ["Learnable", "PerTask", "parameter_groups"]
__all__ += ["EpisodeLoader", "calibrate", "embed", "evaluate", "list_pretrained", "load_pretrained", "split_task"]
__all__ += ["Tuned", "TunedHead", "tune", "use_float32"]
__all__ += ["ConvexHeadsError", "InputError", "MissingDependencyError", "SolverError", "SolverWarning"]
