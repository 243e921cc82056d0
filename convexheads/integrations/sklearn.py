"""Any head as a scikit-learn classifier on plain arrays."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, SVMHead
from convexheads.integrations import require

require("sklearn", "scikit-learn", "1.6", "2", extra="sklearn", needed_by="convexheads.integrations.sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """A head with scikit-learn's interface: in pipelines, grid searches and cross-validation.

    Labels may be strings or any numbers. There is no intercept unless the kernel has one:
    `SVMHead(C=1.0, kernel=Linear() + Constant(1.0))`. Memory grows with the square of the number of samples.

    Args:
        head: any classification head; None (default) is `SVMHead(C=1.0)`, the Crammer-Singer SVM. Its settings are
            parameters: `GridSearchCV(HeadClassifier(SVMHead()), {"head__C": [0.1, 1, 10]})`.

    Attributes:
        classes_: the labels, sorted, `(k,)`.
        fitted_: the fit, with its certificate: `classifier.fitted_.solution.gap`.
        n_features_in_: the number of features, d.
        feature_names_in_: their names, where they came with names.

    Raises:
        ValueError: as scikit-learn's own estimators, for unusable data; `convexheads.InputError` is one of these.
        SolverError: the problem could not be solved (see the solver's `on_failure`).
    """

    def __init__(self, head: Any = None) -> None:  # anything, and checked in `fit`, as scikit-learn wants it
        self.head = head

    def fit(self, X: Any, y: Any) -> HeadClassifier:
        """Fit the head.

        Args:
            X: samples, array-like `(n, d)`.
            y: labels, array-like `(n,)`, of at least two classes.

        Returns:
            Itself.

        Raises:
            ValueError: unusable data or one class only; `InputError` for a `head` that is none.
            SolverError: the problem could not be solved (see the solver's `on_failure`).
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"HeadClassifier needs two classes at least; y holds one class only: {self.classes_[0]!r}")
        if self.head is not None and not isinstance(self.head, ClassificationHead):
            raise InputError(
                "head", "a classification head of convexheads, such as SVMHead(C=1.0), or None", repr(self.head)
            )
        head = SVMHead(C=1.0) if self.head is None else deepcopy(self.head)
        with torch.no_grad():
            self.fitted_ = head.fit(torch.tensor(X), torch.tensor(labels), ways=len(self.classes_))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits `(q, k)`; of two classes the second one's minus the first one's, `(q,)`.

        Args:
            X: samples, array-like `(q, d)`.

        Raises:
            ValueError: unusable samples; `sklearn.exceptions.NotFittedError`, which is one, before a fit.
        """
        logits = self._logits(X).numpy()
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of each sample, `(q,)`.

        Args:
            X: samples, array-like `(q, d)`.

        Raises:
            ValueError: as `decision_function`.
        """
        best = self._logits(X).argmax(-1).numpy()
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The softmax of the logits, `(q, k)`; as good as the head's scale (see `convexheads.calibrate`).

        Args:
            X: samples, array-like `(q, d)`.

        Raises:
            ValueError: as `decision_function`.
        """
        return self._logits(X).softmax(-1).numpy()

    @torch.no_grad()
    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return self.fitted_(torch.tensor(X, dtype=self.fitted_.dtype))
