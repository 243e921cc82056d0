"""The training runs that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.options import Options

SHORT = 10_000
"""Training steps of the rows of Table 4 and the points of Figure 2."""


@dataclass(frozen=True)
class Entry:
    """A training run in the queue.

    Attributes:
        name: the folder of its results.
        recipe: the name of its recipe.
        changes: options that override the recipe.
    """

    name: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)

    def options(self, **more: Any) -> Options:
        """The options of the run."""
        return Options.from_recipe(self.recipe, **(self.changes | more))


def _table4() -> Iterator[Entry]:
    """The rows of Table 4 on CIFAR-FS, named after what they add to plain training."""
    plain = {"augment": "none", "weight_decay": 0.0, "dropblock": "none", "steps": SHORT}
    added: dict[str, dict[str, Any]] = {
        "augmentation": {"augment": "flip-crop-jitter"},
        "decay": {"weight_decay": 5e-4},
        "dropblock": {"dropblock": "paper"},
        "smoothing": {"label_smoothing": 0.1},
        "trainval": {"trainval": True},
    }
    base = "table2/cifar-fs/resnet12/svm"
    yield Entry("table4_cifar-fs_resnet12_svm-none", base, plain)
    yield Entry("table4_cifar-fs_resnet12_svm-decay", base, plain | added["decay"])
    names, changes = "", plain
    for name, change in added.items():
        names, changes = f"{names}-{name}", changes | change
        yield Entry(f"table4_cifar-fs_resnet12_svm{names}", base, changes)


def _queue() -> Iterator[Entry]:
    first = [
        Entry(f"table2_cifar-fs_resnet12_{name}", f"table2/cifar-fs/resnet12/{name}")
        for name in ("svm", "ridge", "prototypes-5-shot", "prototypes-1-shot")
    ]
    yield from first
    yield Entry("table2_cifar-fs_r2d2_ridge", "table2/cifar-fs/resnet12/ridge", {"backbone": "r2d2"})
    for name in ("svm", "ridge", "prototypes-5-shot", "prototypes-1-shot"):
        yield Entry(f"table2_fc100_resnet12_{name}", f"table2/fc100/resnet12/{name}")
    # The row with DropBlock is the point of Figure 2 with 5 shots.
    yield from (each for each in _table4() if not each.name.endswith("-dropblock"))
    for head in ("svm", "prototypes"):
        for shots in (1, 5, 10, 15):
            name = f"{head}-{shots}-shot"
            yield Entry(f"figure2_cifar-fs_resnet12_{name}", f"figure2/cifar-fs/resnet12/{name}", {"steps": SHORT})
    for dataset in ("cifar-fs", "fc100"):
        yield Entry(f"table2_{dataset}_resnet12_svm-trainval", f"table2/{dataset}/resnet12/svm-trainval")
    for head in ("svm", "ridge", "prototypes"):
        yield Entry(f"fast_cifar-fs_resnet12_{head}", f"fast/cifar-fs/resnet12/{head}")
    for seed in (1, 2):
        yield from (Entry(f"{each.name}-seed-{seed}", each.recipe, {"seed": seed}) for each in first[:3])


QUEUE = tuple(_queue())
"""The training runs, in order of importance."""
SMOKE_QUEUE = (
    Entry("smoke_svm", "table2/cifar-fs/resnet12/svm"),
    Entry("smoke_ridge", "table2/cifar-fs/resnet12/ridge"),
)


def shrink(options: Options) -> Options:
    """The same options with a network and sizes that take seconds on any machine."""
    return replace(
        options,
        dataset="digits",
        backbone="conv4",
        steps=4,
        tasks=2,
        queries=1,
        shots=1,
        validate_every=2,
        validation_episodes=4,
        test_episodes=8,
        checkpoint_every=1,
    )
