"""Any head as a scikit-learn classifier on plain arrays."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from convexheads.heads import SVMHead
from convexheads.heads.base.classification import check_head
from convexheads.integrations import require_version

require_version("sklearn", "scikit-learn>=1.6,<2", extra="sklearn")

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """A head with scikit-learn's interface, for pipelines, grid searches and cross-validation.

    Labels may be strings or integers. There is no intercept unless the kernel has one:
    `SVMHead(C=1.0, kernel=Linear() + Constant(1.0))`. Arguments of the head and of its kernel (but not of parts of a
    sum or product) are parameters too, such as `head__C` and `head__kernel__length_scale`, so a search can vary them.

    Use it when you compare a head with scikit-learn's classifiers on up to a few thousand samples.

    Args:
        head: A classification head; None stands for `SVMHead(C=1.0)`, the Crammer-Singer SVM. A search over its
            arguments, such as `head__C`, needs an explicit head.

    Attributes:
        classes_: The sorted labels, `(k,)`.
        fitted_: The fitted head, with its certificate: `classifier.fitted_.solution.gap`.

    Raises:
        ValueError: The data or the head are unusable, or there was no fit (`InputError`, `NotFittedError`).
        SolverError: The problem could not be solved (see the solver's `on_failure`).

    Example:
        `GridSearchCV(HeadClassifier(SVMHead()), {"head__C": [0.1, 1.0, 10.0]}).fit(X, y)`
    """

    def __init__(self, head: Any = None) -> None:  # checked in `fit`, as scikit-learn requires
        self.head = head

    def fit(self, X: Any, y: Any) -> HeadClassifier:
        """Fit the head to samples `X` `(n, d)` and labels `y` `(n,)` of at least two classes; return the classifier."""
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], order="C")  # torch has no negative strides
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"HeadClassifier needs at least two classes; y has one class only: {classes[0]!r}")
        head = SVMHead(C=1.0) if self.head is None else deepcopy(check_head(self.head))
        with torch.no_grad():
            self.fitted_ = head.fit(torch.tensor(X), torch.tensor(labels), ways=len(classes))
        self.classes_ = classes
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Compute the logits of samples `X`, `(q, k)`; for two classes, the second minus the first one, `(q,)`."""
        logits = self._logits(X).numpy()
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable label of each sample of `X`, `(q,)`."""
        best = self._logits(X).argmax(-1).numpy()  # computed first, so that a missing fit raises `NotFittedError`
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Compute the softmax of the logits of samples `X`, `(q, k)`.

        To calibrate them, pass the head that `convexheads.calibrate` returns, or use `CalibratedClassifierCV`.
        """
        return self._logits(X).softmax(-1).numpy()

    @torch.no_grad()
    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self, "fitted_")
        X = validate_data(self, X, dtype=[np.float64, np.float32], order="C", reset=False)
        return self.fitted_(torch.tensor(X, dtype=self.fitted_.dtype))
