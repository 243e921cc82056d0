"""Any head behind learn2learn's protocol of classifiers.

For learn2learn 0.2. A head needs no adapter in a loop of one's own: `split_task` takes what a taskset samples.
"""

from __future__ import annotations

from torch import Tensor, nn

from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.integrations import require

require(
    "learn2learn", "learn2learn", "0.2", "0.3", extra="learn2learn", needed_by="convexheads.integrations.learn2learn"
)


class HeadClassifier(nn.Module):
    """A head in the place of learn2learn's `SVClassifier` or `PrototypicalClassifier`.

    `classifier.fit_(support, labels)`, then `classifier(query)`. `LightningPrototypicalNetworks` and
    `LightningMetaOptNet` train with it when it is set as their `.classifier`.
    With `SVMHead(C=0.1, smoothing=1.0)` it gives what `SVClassifier()` gives, but for the latter's early stopping; with
    `PrototypeHead()` what `PrototypicalClassifier()` gives.

    What differs: labels may be any integers, of which the smallest is class 0, and so on, as `PrototypicalClassifier`
    has it (`SVClassifier` wants 0 to k - 1); several tasks may be fitted at once, in leading dimensions; calling it
    before it is fitted is an error that says so.

    Args:
        head: any classification head.
        support: features `(*batch, n, d)` to fit on at once; None (default) for later.
        labels: theirs, `(*batch, n)`; None (default) for later.
        ways: as in `fit_`. Default None.

    Raises:
        InputError: no head, only one of support and labels is given, or they are unusable.
        SolverError: a task could not be solved (see the solver's `on_failure`).
    """

    def __init__(
        self,
        head: ClassificationHead,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        ways: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, ClassificationHead):
            raise InputError("head", "a classification head of convexheads, such as SVMHead(C=0.1)", repr(head))
        self.head = head
        self.fitted: FittedClassifier | None = None
        if (support is None) != (labels is None):
            missing = "support" if support is None else "labels"
            raise InputError(missing, "support and labels together, or neither", "None")
        if support is not None and labels is not None:
            self.fit_(support, labels, ways)

    def fit_(self, support: Tensor, labels: Tensor, ways: int | None = None) -> None:
        """Fit the head and keep the result, with its gradients, until the next call.

        Args:
            support: features `(*batch, n, d)`.
            labels: integers, `(*batch, n)`. Unless `ways` is given they are renumbered: the smallest is class 0.
            ways: number of classes; labels are then 0 to ways - 1. None, the default: as many as there are labels.

        Raises:
            InputError: unusable support or labels.
            SolverError: a task could not be solved (see the solver's `on_failure`).
        """
        if ways is None:
            classes, labels = labels.unique(return_inverse=True)
            ways = len(classes)
        self.fitted = self.head.fit(support, labels, ways=ways)

    def forward(self, query: Tensor) -> Tensor:
        """Score queries.

        Args:
            query: features `(*batch, q, d)`.

        Returns:
            Logits `(*batch, q, k)`.

        Raises:
            InputError: it was not fitted yet, or the queries don't go with the support.
        """
        if self.fitted is None:
            raise InputError("classifier", "a call of fit_(support, labels) first", "a query before any support")
        return self.fitted(query)
