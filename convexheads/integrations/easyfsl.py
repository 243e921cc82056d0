"""Any head as one of easyfsl's classifiers, for easyfsl 1.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.integrations import require

require("easyfsl", "easyfsl", "1.5", "2", extra="easyfsl", needed_by="convexheads.integrations.easyfsl")

import easyfsl.samplers
from easyfsl.methods import FewShotClassifier


class HeadClassifier(FewShotClassifier):
    """A head as a `FewShotClassifier`: `process_support_set(images, labels)`, then a call with query images.

    It runs with easyfsl's `TaskSampler`, `evaluate` and training scripts, as its `PrototypicalNetworks` does. What
    differs: prototypes are not kept, and labels other than 0 to k - 1, on which easyfsl's own methods go wrong, are an
    error.

    Args:
        head: any classification head.
        backbone: from images `(n, *image)` to features `(n, d)`; None (default): the images are features already.
        settings: easyfsl's further ones: `use_softmax`, `feature_centering`, `feature_normalization`.

    Raises:
        InputError: no head.
        TypeError: a setting that easyfsl doesn't have.
    """

    def __init__(self, head: ClassificationHead, backbone: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(backbone=backbone, **settings)
        if not isinstance(head, ClassificationHead):
            raise InputError("head", "a classification head of convexheads, such as SVMHead(C=0.1)", repr(head))
        self.head = head
        self.fitted: FittedClassifier | None = None

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Fit the head and keep the result until the next call.

        Args:
            support_images: `(n, *image)`, or features `(n, d)` where there is no backbone.
            support_labels: integers from 0 to k - 1, `(n,)`.

        Raises:
            InputError: other labels, or features that are unusable.
            ValueError: features of more than one dimension an image, which is easyfsl's own error.
            SolverError: the task could not be solved (see the solver's `on_failure`).
        """
        classes = support_labels.unique()
        if not torch.equal(classes, torch.arange(len(classes), device=classes.device)):
            raise InputError("support_labels", "0 to k - 1, each at least once", f"classes {classes.tolist()}")
        features = self.compute_features(support_images)
        self._raise_error_if_features_are_multi_dimensional(features)
        self.fitted = self.head.fit(features, support_labels, ways=len(classes))

    def forward(self, query_images: Tensor) -> Tensor:
        """Score queries.

        Args:
            query_images: `(q, *image)`.

        Returns:
            Logits `(q, k)`; probabilities with `use_softmax=True`.

        Raises:
            InputError: no support set yet, or features that don't go with it.
        """
        if self.fitted is None:
            raise InputError("classifier", "a call of process_support_set first", "a query before any support")
        return self.softmax_if_specified(self.fitted(self.compute_features(query_images)))

    @staticmethod
    def is_transductive() -> bool:
        """Queries are classified one by one."""
        return False


class _DataSource:
    """Takes the argument that PyTorch's samplers had until they lost their constructor."""

    def __init__(self, data_source: object = None) -> None: ...


class TaskSampler(easyfsl.samplers.TaskSampler, _DataSource):
    """easyfsl's `TaskSampler`, with the same arguments, for current versions of PyTorch too, where that fails.

    Takes `dataset`, one of easyfsl's with a method `get_labels`; `n_way`, classes of a task; `n_shot` and `n_query`,
    support and query images a class; and `n_tasks`, how many tasks.

    Raises:
        ValueError: too few classes or images in the data set, which is easyfsl's own error.
    """
