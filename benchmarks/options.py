"""The options of a training run, from a recipe, a file or the command line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

import jsonargparse
import torch
import yaml

from benchmarks import recipes
from convexheads.errors import InputError

BUILT_IN = {"digits": 60, "glyphs": 120}
"""The data sets that need no files, with their default numbers of training steps."""


@dataclass(frozen=True)
class Options:
    """The options of a run, annotated with their `--help` texts.

    A subclass may define the options of another command, with other defaults.
    """

    program: ClassVar[str] = "benchmarks.train"
    defaults: ClassVar[dict[str, Any]] = {}

    dataset: Annotated[
        Literal["digits", "glyphs", "cifar-fs", "fc100", "miniimagenet", "tieredimagenet", "omniglot"],
        "digits and glyphs need no files, the others need DATA_ROOT",
    ] = "digits"
    data_root: Annotated[
        Path | None, "folder of the data (read-only); default: the environment variable CONVEXHEADS_DATA"
    ] = None
    backbone: Annotated[Literal["conv4", "r2d2", "resnet12"], "network to train"] = "conv4"
    dropblock: Annotated[Literal["paper", "reference_code", "none"], "DropBlock of resnet12, see `ResNet12`"] = "paper"
    head: Annotated[
        Literal["svm", "svm-unit-scale", "svm-smoothed", "ridge", "prototypes"],
        "head to train through; svm, ridge and prototypes are always evaluated",
    ] = "svm"
    steps: Annotated[int | None, "training steps; default: 60 for digits, 120 for glyphs, 5000 for others"] = None
    tasks: Annotated[int, "episodes per training step"] = 8
    ways: Annotated[int, "classes per episode, in training and evaluation"] = 5
    shots: Annotated[int, "support images per class in training"] = 5
    queries: Annotated[int, "query images per class in training"] = 6
    learning_rate: Annotated[float, "initial learning rate of SGD, which has Nesterov momentum 0.9"] = 0.1
    schedule: Annotated[Literal["cosine", "paper", "constant"], "learning-rate schedule"] = "cosine"
    weight_decay: Annotated[float, "weight decay of SGD"] = 5e-4
    label_smoothing: Annotated[float, "label smoothing of the cross-entropy"] = 0.0
    augment: Annotated[
        Literal["none", "flip-crop", "flip-crop-jitter"] | None,
        "augmentation of training images; default: none for digits and glyphs, flip-crop for others",
    ] = None
    trainval: Annotated[bool, "also train on the validation classes, and keep the last weights"] = False
    rotations: Annotated[bool, "also train on rotated images (90, 180, 270 degrees) as new classes"] = False
    average: Annotated[
        float, "decay per step of a moving average of the weights, which is validated and saved; 0 for no average"
    ] = 0.0
    on_failure: Annotated[
        Literal["raise", "skip", "stop"],
        "for a step with a non-finite loss or gradient: raise an error, skip the step, or stop before it",
    ] = "raise"
    validate_every: Annotated[int, "training steps between validations; the best weights are kept"] = 500
    validation_episodes: Annotated[int, "episodes per validation"] = 500
    validation_shots: Annotated[int, "support images per class in validation"] = 5
    checkpoint_every: Annotated[int, "training steps between checkpoints"] = 100
    test_shots: Annotated[tuple[int, ...], "support images per class in evaluation, as in [1,5]"] = (1, 5)
    test_queries: Annotated[int, "query images per class in evaluation and validation"] = 15
    test_episodes: Annotated[int, "episodes of the evaluation, the same for every head"] = 2000
    seed: Annotated[int, "seed of the initial weights and of all random draws"] = 0
    threads: Annotated[int | None, "processor threads; default: PyTorch's choice"] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], "device to compute on"] = "auto"
    precision: Annotated[
        Literal["float32", "bfloat16"],
        "precision of the backbone in training (bfloat16 by autocast); heads solve in float64",
    ] = "float32"
    backend: Annotated[
        Literal["auto", "torch", "numba", "cuda"],
        "backend of the SVMs' solver; cuda solves on the GPU in one launch, without copies to the CPU",
    ] = "auto"
    processes: Annotated[int, "processes that share every training step, one per device"] = 1
    compile: Annotated[
        Literal["none", "default", "reduce-overhead", "max-autotune"] | None,
        "mode of torch.compile for the backbone; default: none on the CPU, default on a GPU",
    ] = None
    output: Annotated[Path | None, "folder for checkpoints and results; default: runs/DATASET_BACKBONE_HEAD"] = None
    resume: Annotated[bool, "continue the unfinished run in the output folder"] = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if name in ("seed", "weight_decay", "label_smoothing", "average"):
                    if number < 0:
                        raise InputError(name, "0 or more", number)
                elif isinstance(number, int | float) and not isinstance(number, bool) and number <= 0:
                    raise InputError(name, "more than 0", number)
        if self.average >= 1:
            raise InputError("average", "less than 1", self.average)

    @property
    def total_steps(self) -> int:
        return self.steps or BUILT_IN.get(self.dataset, 5000)

    @property
    def augmentation(self) -> str:
        return self.augment or ("none" if self.dataset in BUILT_IN else "flip-crop")

    @property
    def root(self) -> Path | None:
        root = self.data_root or os.environ.get("CONVEXHEADS_DATA")
        return Path(root).expanduser() if root else None

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / f"{self.dataset}_{self.backbone}_{self.head}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.safetensors"

    def compilation(self, device: torch.device) -> str:
        """The mode of `torch.compile` on that device, or "none"."""
        return self.compile or ("default" if device.type == "cuda" else "none")

    def record(self) -> dict[str, Any]:
        """The options that determine the result, ready for YAML, without those for paths, hardware and resuming."""
        record = asdict(self) | {"steps": self.total_steps, "augment": self.augmentation}
        for name in ("data_root", "output", "resume", "threads", "device", "processes", "compile"):
            del record[name]
        return record | {"test_shots": list(self.test_shots)}

    def record_of_dataset(self) -> dict[str, Any]:
        """The options whose defaults depend on the data set."""
        return {name: self.record()[name] for name in ("dataset", "steps", "augment")}

    def command(self) -> str:
        """The command that reproduces the run, with DIR for the folder of the data."""
        words, plain = ["python", "-m", self.program], type(self)(**self.defaults)
        if self.dataset != plain.dataset:
            words += ["--dataset", self.dataset]
        if self.dataset not in BUILT_IN:
            words += ["--data-root", "DIR"]
        plain = plain.record() | replace(self, steps=None, augment=None).record_of_dataset()
        for name, value in self.record().items():
            if value != plain[name]:
                words += ["--" + name.replace("_", "-"), str(value).replace(" ", "")]
        return shlex.join(words)

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> Options:
        """The options of a recipe; `changes` override them.

        Raises:
            InputError: there is no such recipe.
        """
        return cls(**(recipes.find(name) | changes))

    @classmethod
    def parse(cls, arguments: Sequence[str] | None, *, description: str) -> Self:
        """Read the command line. It overrides a file of options, which overrides a recipe.

        Raises:
            InputError: a number is out of range, there is no such recipe, or the file of options is unusable.
        """
        parser = jsonargparse.ArgumentParser(prog=f"python -m {cls.program}", description=description)
        text = "use the options of a recipe, such as table2/cifar-fs/resnet12/svm; its results are in runs/NAME"
        parser.add_argument("--recipe", type=str | None, metavar="NAME", help=text)
        parser.add_argument("--list-recipes", action="store_true", help="print the names of all recipes, and exit")
        text = "read options from a YAML file, such as the config.yaml of a run"
        parser.add_argument("--config", type=Path | None, metavar="FILE", help=text)
        kinds, annotated = get_type_hints(cls), get_type_hints(cls, include_extras=True)
        for each in fields(cls):
            kind: dict[str, Any] = {"type": kinds[each.name]}
            if kinds[each.name] is bool:
                kind = {"action": "store_true"}
            (text,) = annotated[each.name].__metadata__
            default = cls.defaults.get(each.name, each.default)
            parser.add_argument("--" + each.name.replace("_", "-"), default=default, help=text, **kind)
        given = parser.parse_args(arguments)
        if given.list_recipes:
            print(*recipes.RECIPES, sep="\n")
            raise SystemExit
        if given.recipe:
            parser.set_defaults(recipes.find(given.recipe) | {"output": Path("runs") / given.recipe})
        if given.config:
            parser.set_defaults(_typed(read_settings(given.config)))
        values = parser.parse_args(arguments)
        return cls(**{each.name: values[each.name] for each in fields(cls)})


def read_settings(path: Path) -> dict[str, Any]:
    """The options that a YAML file sets.

    Raises:
        InputError: the file can't be read, or has an unknown option.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError("config", "a YAML file of options", f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError("config", "a YAML file of options by name", f"{path}, which holds a {type(content).__name__}")
    if unknown := sorted(map(str, content.keys() - {each.name for each in fields(Options)})):
        raise InputError("config", "options listed by `--help`, with underscores", f"{path} with {', '.join(unknown)}")
    return content


def _typed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
