"""Few-shot heads, one file per family of convex problems."""

from convexheads.heads._linear_algebra import shifted_cholesky
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.fitted import Fitted, FittedClassifier, FittedRegressor
from convexheads.heads.base.head import Head
from convexheads.heads.base.loss import LossHead
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.heads.cvxpy import CvxpyHead, CvxpyTask
from convexheads.heads.discriminant import LinearDiscriminantHead, MahalanobisHead
from convexheads.heads.gaussian_process import FittedGaussianProcess, GaussianProcessHead
from convexheads.heads.logistic import LogisticHead
from convexheads.heads.prototype import PrototypeHead
from convexheads.heads.ridge import RidgeHead, RidgeRegressionHead
from convexheads.heads.svm import (
    MulticlassSVM,
    OneVsRestSVMHead,
    SimplifiedSVMHead,
    SupportVectorRegressionHead,
    SVMHead,
    WestonWatkinsSVMHead,
)

__all__ = ["MulticlassSVM", "OneVsRestSVMHead", "SVMHead", "SimplifiedSVMHead", "WestonWatkinsSVMHead"]
__all__ += ["LinearDiscriminantHead", "LogisticHead", "MahalanobisHead", "PrototypeHead", "RidgeHead"]
__all__ += ["CvxpyHead", "CvxpyTask"]
__all__ += ["GaussianProcessHead", "RidgeRegressionHead", "SupportVectorRegressionHead"]
__all__ += [
    "ClassificationHead",
    "Head",
    "KernelExpansion",
    "LossHead",
    "RegressionHead",
    "SupportSet",
    "shifted_cholesky",
]
__all__ += ["Fitted", "FittedClassifier", "FittedGaussianProcess", "FittedRegressor"]
