"""Few-shot heads, one file a base learner."""

from convexheads.heads.base import Dual, Fitted, Head
from convexheads.heads.cvxpy_problem import CvxpyHead, CvxpyTask
from convexheads.heads.discriminant import LinearDiscriminantHead, MahalanobisHead
from convexheads.heads.gaussian_process import FittedGaussianProcess, GaussianProcessHead
from convexheads.heads.logistic import LogisticHead
from convexheads.heads.one_vs_rest import OneVsRestHead
from convexheads.heads.prototype import PrototypeHead
from convexheads.heads.regression import FittedRegression, RegressionHead
from convexheads.heads.ridge import RidgeHead, RidgeRegressionHead
from convexheads.heads.simplified_svm import SimplifiedSVMHead
from convexheads.heads.support_vector_regression import SupportVectorRegressionHead
from convexheads.heads.svm import MulticlassSVM, SVMHead
from convexheads.heads.weston_watkins import WestonWatkinsHead

__all__ = [
    "CvxpyHead",
    "CvxpyTask",
    "Dual",
    "Fitted",
    "FittedGaussianProcess",
    "FittedRegression",
    "GaussianProcessHead",
    "Head",
    "LinearDiscriminantHead",
    "LogisticHead",
    "MahalanobisHead",
    "MulticlassSVM",
    "OneVsRestHead",
    "PrototypeHead",
    "RegressionHead",
    "RidgeHead",
    "RidgeRegressionHead",
    "SVMHead",
    "SimplifiedSVMHead",
    "SupportVectorRegressionHead",
    "WestonWatkinsHead",
]
