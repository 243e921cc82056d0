"""A plugin of pytest with which the tests of other libraries run on our heads (`nox --session peers`).

It puts our adapters in the place of the classes that those tests import.
"""

from __future__ import annotations

from typing import Any

import easyfsl.methods
import easyfsl.samplers
import learn2learn
from torch import Tensor

from convexheads import PrototypeHead, SVMHead
from convexheads.integrations import easyfsl as for_easyfsl
from convexheads.integrations import learn2learn as for_learn2learn
from convexheads.kernels import Cosine, Linear


class PrototypicalNetworks(for_easyfsl.HeadClassifier):
    """Our head as easyfsl's classifier of this name, whose scores are minus distances, and not minus their squares."""

    def __init__(self, backbone: Any = None, **settings: Any) -> None:
        super().__init__(PrototypeHead(), backbone, **settings)

    def forward(self, query_images: Tensor) -> Tensor:
        return -(-super().forward(query_images)).clamp_min(0).sqrt()

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        super().process_support_set(support_images, support_labels)
        assert self.fitted is not None
        self.prototypes = self.fitted.expansion.weight.float() / 2  # pyright: ignore[reportOptionalMemberAccess]


class SVClassifier(for_learn2learn.HeadClassifier):
    """Our head with the constructor of learn2learn's classifier of this name."""

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        ways: int | None = None,
        normalize: bool = False,
        C_reg: float = 0.1,
    ) -> None:
        super().__init__(SVMHead(C_reg, smoothing=1.0, kernel=Cosine() if normalize else Linear()))
        if support is not None and labels is not None:
            self.fit_(support, labels, ways)


class PrototypicalClassifier(for_learn2learn.HeadClassifier):
    """Our head with the constructor of learn2learn's classifier of this name."""

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__(PrototypeHead(kernel=Cosine() if normalize or distance == "cosine" else Linear()))
        if support is not None and labels is not None:
            self.fit_(support, labels)


PAIRS = (
    (easyfsl.methods, PrototypicalNetworks),
    (easyfsl.samplers, for_easyfsl.TaskSampler),
    (learn2learn.nn, SVClassifier),
    (learn2learn.nn, PrototypicalClassifier),
)
"""Where a class of another library is replaced, and by which."""


def pytest_configure() -> None:
    """Replace the classes, before any test imports them."""
    for module, replacement in PAIRS:
        assert hasattr(module, replacement.__name__)
        setattr(module, replacement.__name__, replacement)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was tested."""
    terminalreporter.write_line("tested: " + ", ".join(f"{each.__module__}.{each.__name__}" for _, each in PAIRS))
