"""Table 4 of the paper: the contribution of each kind of regularization to the SVM, published values and ours.

python -m benchmarks.table4 --data-root DIR                          # Conv-4 on CIFAR-FS, trained for a short time
python -m benchmarks.table4 --data-root DIR --scale paper --train    # ResNet-12 on miniImageNet: needs GPUs

"Larger data" adds the validation classes to the training classes. Conv-4 has no DropBlock.
"""

from __future__ import annotations

from benchmarks.tables import Row, Table, main

AUGMENTATION_DECAY = "augmentation, weight decay"

TABLE = Table(
    "table4",
    "Table 4: regularization of MetaOptNet-SVM, 5-way accuracy",
    ("miniimagenet", "cifar-fs"),
    {
        "paper": [
            Row(name, "ResNet-12", {("miniimagenet", shots): recipe for shots in (1, 5)})
            for name, recipe in (
                ("none", "table4/miniimagenet/resnet12/svm-none"),
                ("augmentation", "table4/miniimagenet/resnet12/svm-augmentation"),
                ("weight decay", "table4/miniimagenet/resnet12/svm-decay"),
                (AUGMENTATION_DECAY, "table4/miniimagenet/resnet12/svm-augmentation-decay"),
                (f"{AUGMENTATION_DECAY}, DropBlock", "table4/miniimagenet/resnet12/svm-augmentation-decay-dropblock"),
                (f"{AUGMENTATION_DECAY}, DropBlock, label smoothing", "table1/miniimagenet/resnet12/svm"),
                (
                    f"{AUGMENTATION_DECAY}, DropBlock, label smoothing, larger data",
                    "table1/miniimagenet/resnet12/svm-trainval",
                ),
            )
        ],
        "laptop": [
            Row(name, "64-64-64-64", {("cifar-fs", shots): f"table4/cifar-fs/conv4/svm-{own}" for shots in (1, 5)})
            for name, own in (
                ("none", "none"),
                ("augmentation", "augmentation"),
                ("weight decay", "decay"),
                (AUGMENTATION_DECAY, "augmentation-decay"),
                (f"{AUGMENTATION_DECAY}, label smoothing", "augmentation-decay-smoothing"),
                (f"{AUGMENTATION_DECAY}, label smoothing, larger data", "augmentation-decay-smoothing-trainval"),
            )
        ],
    },
)

if __name__ == "__main__":
    main(TABLE, __doc__)
