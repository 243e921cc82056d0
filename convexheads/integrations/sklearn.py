"""Any head as a scikit-learn classifier on plain arrays."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from convexheads._validation import check_bool
from convexheads.calibration import best_scale
from convexheads.errors import ConvexHeadsError, InputError
from convexheads.heads import ClassificationHead, FittedClassifier, SVMHead
from convexheads.heads.base.classification import check_head
from convexheads.integrations import require_version

require_version("sklearn", "scikit-learn>=1.6,<2", extra="sklearn")

import numpy as np
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

_FOLDS = 5
# With this number of held-out samples, the scale is precise enough, and no further fold is fitted.
_ENOUGH_HELD_OUT = 500


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """A head with scikit-learn's interface, for pipelines, grid searches and cross-validation.

    Labels may be strings or integers. There is no intercept unless the head has one: `SVMHead(C=1.0, intercept=True)`.
    Arguments of the head and of its kernel (but not of parts of a sum or product) are parameters too, such as `head__C`
    and `head__kernel__length_scale`, so a search can vary them.

    With `sklearn.set_config(array_api_dispatch=True)`, which needs the environment variable `SCIPY_ARRAY_API=1`,
    tensors stay tensors on their device: features on a GPU are fitted there.

    Use it when you compare a head with scikit-learn's classifiers: with `RidgeHead`, `LogisticHead` and
    `OneVsRestSVMHead(squared_hinge=True)` on up to 50,000 samples, and with others on up to a few thousand.

    Args:
        head: A classification head; None stands for `SVMHead(C=1.0)`, the Crammer-Singer SVM, and has the parameters
            of that head, such as `head__C`.
        calibrate: Whether `fit` finds the scale of the logits that gives the best probabilities for held-out samples,
            as `convexheads.calibrate` does on episodes. The held-out samples are those of stratified 5-fold
            cross-validation, in the first folds that have 500 of them together; with fewer than 5 samples of a class,
            there are as many folds as samples of that class. With a single sample of a class, there is no calibration.
            It does not change predictions and `decision_function`, so a search by accuracy is faster without it.

    Attributes:
        classes_: The sorted labels, `(k,)`.
        fitted_: The fitted head, with its certificate: `classifier.fitted_.solution.gap`.
        scale_: The factor of the logits in `predict_proba`; 1.0 without calibration.

    Raises:
        ValueError: The data or the head are unusable, or there was no fit (`InputError`, `NotFittedError`).
        SolverError: The problem could not be solved (see the solver's `on_failure`).

    Example:
        `GridSearchCV(HeadClassifier(), {"head__C": [0.1, 1.0, 10.0]}).fit(X, y)`
    """

    def __init__(
        self, head: Any = None, *, calibrate: Any = True
    ) -> None:  # checked in `fit`, as scikit-learn requires
        self.head = head
        self.calibrate = calibrate

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name; with `deep`, also those of the head, which may be the default one."""
        params = super().get_params(deep)
        if deep and self.head is None:
            params |= {f"head__{name}": value for name, value in _default_head().get_params().items()}
        return params

    def set_params(self, **params: Any) -> HeadClassifier:
        """Change the parameters named in `params`, and return the classifier.

        A parameter of the default head, such as `head__C`, makes that head explicit.
        """
        if params.get("head", self.head) is None and any(name.startswith("head__") for name in params):
            params = {"head": _default_head()} | {name: value for name, value in params.items() if name != "head"}
        return super().set_params(**params)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> HeadClassifier:
        """Fit the head to samples `X` `(n, d)` and labels `y` `(n,)` of at least two classes; return the classifier.

        The `sample_weight`, `(n,)`, has a factor of the loss of each sample, in heads that derive from `LossHead`. For
        the calibration, held-out samples count the same.
        """
        X, y = validate_data(self, X, y, **_accepted(X))
        check_classification_targets(y)
        classes, inverse = (torch if isinstance(y, Tensor) else np).unique(y, return_inverse=True)
        X = _as_tensor(X)
        labels, weight = torch.as_tensor(inverse, device=X.device), None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, labels)
            used = weight != 0  # without the samples that do not count, they are in no fold either
            present, labels = labels[used].unique(return_inverse=True)
            X, weight = X[used], weight[used]
            classes = classes[present if isinstance(classes, Tensor) else present.cpu().numpy()]
        calibrate = check_bool("calibrate", self.calibrate)
        if len(classes) < 2:
            raise ValueError(f"HeadClassifier needs at least two classes; y has one class only: {classes[0]!r}")
        head = _default_head() if self.head is None else check_head(self.head)
        fitted = _fit(head, X, labels, weight)
        scale = _best_scale(head, X, labels, weight) if calibrate else 1.0
        self.fitted_, self.scale_, self.classes_ = fitted, scale, classes
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Compute the logits of samples `X`, `(q, k)`; for two classes, the second minus the first one, `(q,)`."""
        logits = self._logits(X)
        return _like(X, logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable label of each sample of `X`, `(q,)`."""
        best = self._logits(X).argmax(-1)  # computed first, so that a missing fit raises `NotFittedError`
        return self.classes_[best if isinstance(self.classes_, Tensor) else best.cpu().numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Compute the probabilities of samples `X`, `(q, k)`: the softmax of the logits times `scale_`.

        With `calibrate=True`, they are calibrated by cross-validation.
        """
        logits = self._logits(X)
        return _like(X, (self.scale_ * logits).softmax(-1))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        return tags

    @property
    def coef_(self) -> np.ndarray:
        """The weights of `decision_function`, `(k, d)`, or `(1, d)` for two classes, if the kernel is linear."""
        return self._difference(self._linear().weight)

    @property
    def intercept_(self) -> np.ndarray:
        """The biases of `decision_function`, `(k,)`, or `(1,)` for two classes, if the kernel is linear."""
        return self._difference(self._linear().bias)

    def to_linear(self) -> nn.Linear:
        """Make an `nn.Linear` whose softmax is `predict_proba`, if the kernel is linear; `scale_` is part of it."""
        layer = self._linear()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(self.scale_)
        return layer

    def _linear(self) -> nn.Linear:
        check_is_fitted(self, "fitted_")
        try:
            return self.fitted_.to_linear()
        except ConvexHeadsError as error:  # as for all attributes that an object may lack
            raise AttributeError(f"coef_, intercept_, to_linear: {error}") from error

    def _difference(self, parameter: Tensor) -> np.ndarray:
        value = parameter.detach()
        return (value[1:] - value[:1] if len(self.classes_) == 2 else value).cpu().numpy()

    @torch.no_grad()
    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self, "fitted_")
        X = validate_data(self, X, reset=False, **_accepted(X))
        return self.fitted_(_as_tensor(X).to(self.fitted_.dtype))


def _keeps_tensors(X: Any) -> bool:
    """Whether results are tensors on the device of X, which scikit-learn's option `array_api_dispatch` asks for."""
    return isinstance(X, Tensor) and get_config()["array_api_dispatch"]


def _accepted(X: Any) -> dict[str, Any]:
    """The arrays that `validate_data` returns; torch has no negative strides."""
    if _keeps_tensors(X):
        return {"dtype": [torch.float64, torch.float32]}
    return {"dtype": [np.float64, np.float32], "order": "C"}


def _as_tensor(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.tensor(array)


def _like(X: Any, result: Tensor) -> Any:
    """A result as an array of the kind of X."""
    return result if _keeps_tensors(X) else result.cpu().numpy()


def _check_sample_weight(sample_weight: Any, labels: Tensor) -> Tensor:
    values = sample_weight if isinstance(sample_weight, Tensor) else np.asarray(sample_weight, dtype=np.float64)
    weight = torch.as_tensor(values, dtype=torch.float64, device=labels.device)
    if weight.shape != labels.shape:
        raise InputError("sample_weight", f"shape {tuple(labels.shape)}", tuple(weight.shape))
    if not weight.any():
        raise InputError("sample_weight", "a positive weight", "only zeros")
    return weight


def _default_head() -> SVMHead:
    return SVMHead(C=1.0)


@torch.no_grad()
def _fit(head: ClassificationHead, X: Tensor, labels: Tensor, weight: Tensor | None) -> FittedClassifier:
    """Fit a copy of a head."""
    return deepcopy(head).fit(X, labels, ways=int(labels.max()) + 1, sample_weight=weight)


def _best_scale(head: ClassificationHead, X: Tensor, labels: Tensor, weight: Tensor | None) -> float:
    """The best scale of logits of samples that were held out from the fit; 1.0 if any class has only one sample."""
    folds = min(_FOLDS, int(labels.bincount().min()))
    if folds < 2:
        return 1.0
    logits, truth = [], []
    known = labels.cpu().numpy()
    for pair in StratifiedKFold(folds, shuffle=True, random_state=0).split(np.zeros(len(known)), known):
        rest, held_out = (torch.as_tensor(indices, device=X.device) for indices in pair)
        own = None if weight is None else weight[rest]
        with torch.no_grad():
            logits.append(_fit(head, X[rest], labels[rest], own)(X[held_out]).double())
        truth.append(labels[held_out])
        if sum(map(len, truth)) >= _ENOUGH_HELD_OUT:
            break
    return best_scale(torch.cat(logits), torch.cat(truth))
