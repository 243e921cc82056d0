"""Any head as one of easyfsl's classifiers, for easyfsl 1.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convexheads._validation import check_tensor, is_integer_tensor
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.heads.base.classification import check_head
from convexheads.integrations import require_version

require_version("easyfsl", "easyfsl>=1.5,<2", extra="easyfsl")

import easyfsl.samplers
from easyfsl.methods import FewShotClassifier


class HeadClassifier(FewShotClassifier):
    """A head as one of easyfsl's `FewShotClassifier`s.

    It runs with easyfsl's `TaskSampler`, `evaluate` and training scripts. Labels other than 0 to k - 1, for which
    easyfsl's own methods return wrong results, are an error.

    Use it when you evaluate or train with easyfsl's scripts.

    Args:
        head: A classification head.
        backbone: The module from images `(n, *image)` to features `(n, d)`; by default, the images are the features.
        settings: Further arguments of easyfsl: `use_softmax`, `feature_centering`, `feature_normalization`.

    Example:
        `classifier = HeadClassifier(SVMHead(C=0.1), backbone)`, then
        `classifier.process_support_set(images, labels)` and `classifier(query_images)`
    """

    def __init__(self, head: ClassificationHead, backbone: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(backbone=backbone, **settings)
        self.head = check_head(head)
        self.fitted: FittedClassifier | None = None

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Fit the head to `support_images` `(n, *image)` with `support_labels` from 0 to k - 1, `(n,)`."""
        support_labels = check_tensor("support_labels", support_labels, "a tensor of integers", is_integer_tensor)
        classes = support_labels.unique().tolist()
        if classes != list(range(len(classes))):
            raise InputError("support_labels", "0 to k - 1, each at least once", f"classes {classes}")
        self.fitted = self.head.fit(self.compute_features(support_images), support_labels, ways=len(classes))

    def forward(self, query_images: Tensor) -> Tensor:
        """Compute the logits `(q, k)` of `query_images` `(q, *image)`; with `use_softmax=True`, probabilities."""
        if self.fitted is None:
            raise InputError("classifier", "a call to process_support_set first", "a query before any support set")
        return self.softmax_if_specified(self.fitted(self.compute_features(query_images)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fitted": None}  # belongs to the current task, and PyTorch cannot copy its gradients

    @staticmethod
    def is_transductive() -> bool:
        """Return False, because queries are classified independently of each other."""
        return False


class _DataSource:
    def __init__(self, data_source: object = None) -> None:
        """Accept the argument `data_source`, which the samplers of recent PyTorch versions do not."""


class TaskSampler(easyfsl.samplers.TaskSampler, _DataSource):
    """easyfsl's `TaskSampler` for current versions of PyTorch, with which the original fails.

    The arguments are the same: `dataset`, `n_way`, `n_shot`, `n_query` and `n_tasks`.
    """
