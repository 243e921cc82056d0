"""Table 2 of the paper: CIFAR-FS and FC100, published values and ours.

python -m benchmarks.table2 --data-root DIR                          # Conv-4, from the committed weights: minutes
python -m benchmarks.table2 --data-root DIR --scale paper --train    # ResNet-12, as in the paper: needs GPUs
"""

from __future__ import annotations

from benchmarks.tables import HEADS, Row, Table, main

DATASETS = ("cifar-fs", "fc100")
CELLS = [(dataset, shots) for dataset in DATASETS for shots in (1, 5)]

TABLE = Table(
    "table2",
    "Table 2: 5-way accuracy on CIFAR-FS and FC100",
    DATASETS,
    {
        "paper": [
            Row(
                "ProtoNets",
                "ResNet-12",
                {(data, shots): f"table2/{data}/resnet12/prototypes-{shots}-shot" for data, shots in CELLS},
            ),
            *(
                Row(name, "ResNet-12", {(data, shots): f"table2/{data}/resnet12/{head}" for data, shots in CELLS})
                for head, name in (
                    ("ridge", "MetaOptNet-RR"),
                    ("svm", "MetaOptNet-SVM"),
                    ("svm-trainval", "MetaOptNet-SVM-trainval"),
                )
            ),
        ],
        "laptop": [
            Row(name, "64-64-64-64", {(data, shots): f"table2/{data}/conv4/{head}" for data, shots in CELLS})
            for head, name in HEADS.items()
        ],
    },
)

if __name__ == "__main__":
    main(TABLE, __doc__)
