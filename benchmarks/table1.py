"""Table 1 of the paper: miniImageNet and tieredImageNet, published values and ours.

python -m benchmarks.table1 --data-root DIR                          # Conv-4 trained on CIFAR-FS: across domains
python -m benchmarks.table1 --data-root DIR --scale paper --train    # ResNet-12, as in the paper: needs GPUs
"""

from __future__ import annotations

from benchmarks.tables import HEADS, Row, Table, main

DATASETS = ("miniimagenet", "tieredimagenet")
CELLS = [(dataset, shots) for dataset in DATASETS for shots in (1, 5)]

TABLE = Table(
    "table1",
    "Table 1: 5-way accuracy on miniImageNet and tieredImageNet",
    DATASETS,
    {
        "paper": [
            Row(name, "ResNet-12", {(data, shots): f"table1/{data}/resnet12/{head}" for data, shots in CELLS})
            for head, name in (
                ("ridge", "MetaOptNet-RR"),
                ("svm", "MetaOptNet-SVM"),
                ("svm-trainval", "MetaOptNet-SVM-trainval"),
            )
        ],
        "laptop": [
            Row(
                f"{name}, cross-domain from CIFAR-FS",
                "64-64-64-64",
                {("miniimagenet", shots): f"table2/cifar-fs/conv4/{head}" for shots in (1, 5)},
            )
            for head, name in HEADS.items()
        ],
    },
)

if __name__ == "__main__":
    main(TABLE, __doc__)
