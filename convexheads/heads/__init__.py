"""Few-shot heads, one file per convex problem."""

from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.fitted import Fitted, FittedClassifier, FittedRegressor
from convexheads.heads.base.head import Head
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.heads.cvxpy import CvxpyHead, CvxpyTask
from convexheads.heads.discriminant import LinearDiscriminantHead, MahalanobisHead
from convexheads.heads.gaussian_process import FittedGaussianProcess, GaussianProcessHead
from convexheads.heads.logistic import LogisticHead
from convexheads.heads.one_vs_rest import OneVsRestSVMHead
from convexheads.heads.prototype import PrototypeHead
from convexheads.heads.ridge import RidgeHead, RidgeRegressionHead
from convexheads.heads.simplified_svm import SimplifiedSVMHead
from convexheads.heads.support_vector_regression import SupportVectorRegressionHead
from convexheads.heads.svm import MulticlassSVM, SVMHead
from convexheads.heads.weston_watkins import WestonWatkinsSVMHead

__all__ = [
    "ClassificationHead",
    "CvxpyHead",
    "CvxpyTask",
    "Fitted",
    "FittedClassifier",
    "FittedGaussianProcess",
    "FittedRegressor",
    "GaussianProcessHead",
    "Head",
    "KernelExpansion",
    "LinearDiscriminantHead",
    "LogisticHead",
    "MahalanobisHead",
    "MulticlassSVM",
    "OneVsRestSVMHead",
    "PrototypeHead",
    "RegressionHead",
    "RidgeHead",
    "RidgeRegressionHead",
    "SVMHead",
    "SimplifiedSVMHead",
    "SupportSet",
    "SupportVectorRegressionHead",
    "WestonWatkinsSVMHead",
]
