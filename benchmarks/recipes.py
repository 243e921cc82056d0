"""The options of all training runs for tables and figures, by name: `python -m benchmarks.train --recipe NAME`.

A name states the purpose of the run: `TABLE/DATASET/BACKBONE/HEAD`, with `-VARIANT` at the end if there are several.
A recipe sets some of the options of `benchmarks.options.Options`; the others have their defaults. If two dictionaries
set the same option, the one on the right takes precedence. A run that several tables use is listed under one of them.
"""

from __future__ import annotations

from difflib import get_close_matches
from itertools import product
from typing import Any

from convexheads.errors import InputError

Settings = dict[str, Any]

# Schedules.
PAPER: Settings = {  # Section 4.1 of the paper. An epoch is 1,000 steps of 8 episodes, as in the published code.
    "steps": 60_000,
    "tasks": 8,
    "queries": 6,
    "learning_rate": 0.1,
    "schedule": "paper",
    "weight_decay": 5e-4,
    "augment": "flip-crop-jitter",
    "validate_every": 1000,
    "validation_episodes": 2000,
    "checkpoint_every": 500,
    "test_episodes": 10_000,
}
LAPTOP: Settings = {  # Conv-4 in an hour on one processor core.
    "backbone": "conv4",
    "steps": 5000,
    "tasks": 8,
    "queries": 6,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "weight_decay": 5e-4,
    "augment": "flip-crop",
    "test_episodes": 10_000,
}
LAPTOP_SHORT: Settings = LAPTOP | {  # Conv-4 in minutes on one processor core, for tables of many training runs.
    "steps": 500,
    "tasks": 4,
    "precision": "bfloat16",
    "validate_every": 250,
    "test_episodes": 1000,
}
FAST: Settings = PAPER | {  # Unlike the paper: a third of the steps, four times as many classes, averaged weights.
    "steps": 20_000,
    "schedule": "cosine",
    "rotations": True,
    "average": 0.999,
}

# Data sets. The number of shots in meta-training is the one in the paper for the SVM and ridge regression.
CIFAR_FS: Settings = {"dataset": "cifar-fs", "shots": 5}
FC100: Settings = {"dataset": "fc100", "shots": 15}
MINIIMAGENET: Settings = {"dataset": "miniimagenet", "shots": 15}
TIEREDIMAGENET: Settings = {"dataset": "tieredimagenet", "shots": 10}
# A mirrored character is another character, so there is no augmentation.
OMNIGLOT: Settings = {"dataset": "omniglot", "ways": 20, "shots": 5, "queries": 3, "augment": "none"}

# Backbones and heads.
CONV4: Settings = {"backbone": "conv4"}
RESNET12: Settings = {"backbone": "resnet12"}
SVM: Settings = {"head": "svm"}
SVM_SMOOTHED: Settings = {"head": "svm-smoothed"}
RIDGE: Settings = {"head": "ridge"}
PROTOTYPES: Settings = {"head": "prototypes"}

# Variants.
TRAINVAL: Settings = {"trainval": True}  # Rows marked "trainval": trained on the validation classes too.
SMOOTHING: Settings = {"label_smoothing": 0.1}
NO_AUGMENTATION: Settings = {"augment": "none"}
NO_DECAY: Settings = {"weight_decay": 0.0}
NO_DROPBLOCK: Settings = {"dropblock": "none"}
ONE_SHOT: Settings = {"shots": 1, "test_shots": (1,)}
FIVE_SHOTS: Settings = {"shots": 5, "test_shots": (5,)}

# Combinations that several recipes share.
LAPTOP_FC100 = LAPTOP | FC100 | {"shots": 5, "steps": 2500}
PAPER_SVM = PAPER | MINIIMAGENET | RESNET12 | SVM
LAPTOP_SVM = LAPTOP_SHORT | CIFAR_FS | SVM | {"steps": 1000}
LAPTOP_OMNIGLOT = LAPTOP_SHORT | OMNIGLOT | {"steps": 1000}
LAPTOP_FAST = LAPTOP | CIFAR_FS | RIDGE | {"steps": 1000, "validate_every": 1000, "validation_episodes": 2000}

RECIPES: dict[str, Settings] = {
    # Table 1. Its cells at laptop scale are the weights of Table 2 for CIFAR-FS.
    "table1/miniimagenet/resnet12/ridge": PAPER | MINIIMAGENET | RESNET12 | RIDGE | SMOOTHING,
    "table1/miniimagenet/resnet12/svm": PAPER | MINIIMAGENET | RESNET12 | SVM | SMOOTHING,
    "table1/miniimagenet/resnet12/svm-trainval": PAPER | MINIIMAGENET | RESNET12 | SVM | SMOOTHING | TRAINVAL,
    "table1/tieredimagenet/resnet12/ridge": PAPER | TIEREDIMAGENET | RESNET12 | RIDGE,
    "table1/tieredimagenet/resnet12/svm": PAPER | TIEREDIMAGENET | RESNET12 | SVM,
    "table1/tieredimagenet/resnet12/svm-trainval": PAPER | TIEREDIMAGENET | RESNET12 | SVM | TRAINVAL,
    # Table 2. The weights of Conv-4 come with the package, except those for the smoothed SVM.
    "table2/cifar-fs/resnet12/ridge": PAPER | CIFAR_FS | RESNET12 | RIDGE,
    "table2/cifar-fs/resnet12/svm": PAPER | CIFAR_FS | RESNET12 | SVM,
    "table2/cifar-fs/resnet12/svm-trainval": PAPER | CIFAR_FS | RESNET12 | SVM | TRAINVAL,
    "table2/cifar-fs/resnet12/prototypes-1-shot": PAPER | CIFAR_FS | RESNET12 | PROTOTYPES | ONE_SHOT,
    "table2/cifar-fs/resnet12/prototypes-5-shot": PAPER | CIFAR_FS | RESNET12 | PROTOTYPES | FIVE_SHOTS,
    "table2/fc100/resnet12/ridge": PAPER | FC100 | RESNET12 | RIDGE,
    "table2/fc100/resnet12/svm": PAPER | FC100 | RESNET12 | SVM,
    "table2/fc100/resnet12/svm-trainval": PAPER | FC100 | RESNET12 | SVM | TRAINVAL,
    "table2/fc100/resnet12/prototypes-1-shot": PAPER | FC100 | RESNET12 | PROTOTYPES | ONE_SHOT,
    "table2/fc100/resnet12/prototypes-5-shot": PAPER | FC100 | RESNET12 | PROTOTYPES | FIVE_SHOTS,
    "table2/cifar-fs/conv4/prototypes": LAPTOP | CIFAR_FS | PROTOTYPES,
    "table2/cifar-fs/conv4/ridge": LAPTOP | CIFAR_FS | RIDGE,
    "table2/cifar-fs/conv4/svm": LAPTOP | CIFAR_FS | SVM,
    "table2/cifar-fs/conv4/svm-smoothed": LAPTOP | CIFAR_FS | SVM_SMOOTHED,
    "table2/fc100/conv4/prototypes": LAPTOP_FC100 | PROTOTYPES,
    "table2/fc100/conv4/ridge": LAPTOP_FC100 | RIDGE,
    "table2/fc100/conv4/svm": LAPTOP_FC100 | SVM,
    # Table 3. Its other cells are those of Table 1.
    "table3/miniimagenet/conv4/ridge": PAPER | MINIIMAGENET | CONV4 | RIDGE | {"shots": 5},
    "table3/miniimagenet/conv4/svm": PAPER | MINIIMAGENET | CONV4 | SVM | {"shots": 5},
    "table3/miniimagenet/conv4/prototypes-1-shot": PAPER | MINIIMAGENET | CONV4 | PROTOTYPES | ONE_SHOT,
    "table3/miniimagenet/conv4/prototypes-5-shot": PAPER | MINIIMAGENET | CONV4 | PROTOTYPES | FIVE_SHOTS,
    "table3/miniimagenet/resnet12/prototypes-1-shot": PAPER | MINIIMAGENET | RESNET12 | PROTOTYPES | ONE_SHOT,
    "table3/miniimagenet/resnet12/prototypes-5-shot": PAPER | MINIIMAGENET | RESNET12 | PROTOTYPES | FIVE_SHOTS,
    "table3/tieredimagenet/conv4/ridge": PAPER | TIEREDIMAGENET | CONV4 | RIDGE,
    "table3/tieredimagenet/conv4/svm": PAPER | TIEREDIMAGENET | CONV4 | SVM,
    "table3/tieredimagenet/conv4/prototypes-1-shot": PAPER | TIEREDIMAGENET | CONV4 | PROTOTYPES | ONE_SHOT,
    "table3/tieredimagenet/conv4/prototypes-5-shot": PAPER | TIEREDIMAGENET | CONV4 | PROTOTYPES | FIVE_SHOTS,
    "table3/tieredimagenet/resnet12/prototypes-1-shot": PAPER | TIEREDIMAGENET | RESNET12 | PROTOTYPES | ONE_SHOT,
    "table3/tieredimagenet/resnet12/prototypes-5-shot": PAPER | TIEREDIMAGENET | RESNET12 | PROTOTYPES | FIVE_SHOTS,
    # Table 4. A variant names the regularization that it uses; the last rows on miniImageNet are those of Table 1.
    "table4/miniimagenet/resnet12/svm-none": PAPER_SVM | NO_AUGMENTATION | NO_DECAY | NO_DROPBLOCK,
    "table4/miniimagenet/resnet12/svm-augmentation": PAPER_SVM | NO_DECAY | NO_DROPBLOCK,
    "table4/miniimagenet/resnet12/svm-decay": PAPER_SVM | NO_AUGMENTATION | NO_DROPBLOCK,
    "table4/miniimagenet/resnet12/svm-augmentation-decay": PAPER_SVM | NO_DROPBLOCK,
    "table4/miniimagenet/resnet12/svm-augmentation-decay-dropblock": PAPER_SVM,
    "table4/cifar-fs/conv4/svm-none": LAPTOP_SVM | NO_AUGMENTATION | NO_DECAY,
    "table4/cifar-fs/conv4/svm-augmentation": LAPTOP_SVM | NO_DECAY,
    "table4/cifar-fs/conv4/svm-decay": LAPTOP_SVM | NO_AUGMENTATION,
    "table4/cifar-fs/conv4/svm-augmentation-decay": LAPTOP_SVM,
    "table4/cifar-fs/conv4/svm-augmentation-decay-smoothing": LAPTOP_SVM | SMOOTHING,
    "table4/cifar-fs/conv4/svm-augmentation-decay-smoothing-trainval": LAPTOP_SVM | SMOOTHING | TRAINVAL,
    # Omniglot, 20-way. The weights come with the package.
    "omniglot/omniglot/conv4/prototypes": LAPTOP_OMNIGLOT | PROTOTYPES,
    "omniglot/omniglot/conv4/ridge": LAPTOP_OMNIGLOT | RIDGE,
    "omniglot/omniglot/conv4/svm": LAPTOP_OMNIGLOT | SVM,
    # A recipe of our own; with Conv-4 the contribution of each of its parts, in 20 minutes on one processor core.
    "fast/cifar-fs/resnet12/prototypes": FAST | CIFAR_FS | RESNET12 | PROTOTYPES,
    "fast/cifar-fs/resnet12/ridge": FAST | CIFAR_FS | RESNET12 | RIDGE,
    "fast/cifar-fs/resnet12/svm": FAST | CIFAR_FS | RESNET12 | SVM,
    "fast/cifar-fs/conv4/ridge-plain": LAPTOP_FAST,
    "fast/cifar-fs/conv4/ridge-average": LAPTOP_FAST | {"average": 0.99},
    "fast/cifar-fs/conv4/ridge-rotations": LAPTOP_FAST | {"rotations": True},
    "fast/cifar-fs/conv4/ridge-rotations-average": LAPTOP_FAST | {"rotations": True, "average": 0.99},
}

# Figure 2. The variant is the number of shots in meta-training.
for data, head, shots in product((MINIIMAGENET, TIEREDIMAGENET, CIFAR_FS, FC100), (SVM, PROTOTYPES), (1, 5, 10, 15)):
    smoothing = SMOOTHING if (data, head) == (MINIIMAGENET, SVM) else {}
    name = f"figure2/{data['dataset']}/resnet12/{head['head']}-{shots}-shot"
    RECIPES[name] = PAPER | data | RESNET12 | head | smoothing | {"shots": shots}
for data, head, shots in product((CIFAR_FS, FC100), (SVM, PROTOTYPES), (1, 5, 10, 15)):
    name = f"figure2/{data['dataset']}/conv4/{head['head']}-{shots}-shot"
    RECIPES[name] = LAPTOP_SHORT | data | head | {"shots": shots}


def find(name: str) -> Settings:
    """The options that a recipe sets.

    Args:
        name: its name in `RECIPES`.

    Raises:
        InputError: there is no such recipe.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1, cutoff=0)[0]
        names = "".join(f"\n  {each}" for each in RECIPES)
        raise InputError("recipe", f"one of the names below, such as {close}", f"{name}{names}")
    return dict(RECIPES[name])
