"""Any head with learn2learn's classifier interface, for learn2learn 0.2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convexheads._validation import check_tensor, is_integer_tensor
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.heads.base.classification import check_head
from convexheads.integrations import require_version

require_version("learn2learn", "learn2learn>=0.2,<0.3", extra="learn2learn")


class HeadClassifier(nn.Module):
    """A head with the interface of learn2learn's `SVClassifier` and `PrototypicalClassifier`.

    `LightningPrototypicalNetworks` and `LightningMetaOptNet` train with it when it is set as their `.classifier`. With
    `PrototypeHead()`, it computes the same as `PrototypicalClassifier()`; with `SVMHead(C=0.1, smoothing=1.0)`, it
    computes the same as `SVClassifier()`, except that the latter stops early.

    Use it when you train with learn2learn's Lightning modules.

    Args:
        head: A classification head.

    Example:
        `classifier = HeadClassifier(SVMHead(C=0.1))`, then `classifier.fit_(support, labels)` and `classifier(query)`
    """

    def __init__(self, head: ClassificationHead) -> None:
        super().__init__()
        self.head = check_head(head)
        self.fitted: FittedClassifier | None = None

    def fit_(self, support: Tensor, labels: Tensor, ways: int | None = None) -> None:
        """Fit the head to features `support` `(*batch, n, d)` and keep the result, with its gradients.

        The `labels`, integers `(*batch, n)`, are from 0 to `ways` - 1. Without `ways`, they are renumbered in ascending
        order over all tasks of a batch, which therefore need the same classes.
        """
        if ways is None:
            labels = check_tensor("labels", labels, "a tensor of integers", is_integer_tensor, like=support)
            classes, labels = labels.unique(return_inverse=True)
            ways = len(classes)
        self.fitted = self.head.fit(support, labels, ways=ways)

    def forward(self, query: Tensor) -> Tensor:
        """Compute the logits `(*batch, q, k)` of the features `query` `(*batch, q, d)`, after a call to `fit_`."""
        if self.fitted is None:
            raise InputError("classifier", "a call to fit_(support, labels) first", "a query before any support set")
        return self.fitted(query)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fitted": None}  # belongs to the current task, and PyTorch cannot copy its gradients
