"""Omniglot, 20-way: Conv-4 trained through each head, next to the published results of prototypes.

python -m benchmarks.omniglot --data-root DIR      # from weights that come with the package: minutes
"""

from __future__ import annotations

from benchmarks.tables import HEADS, Row, Table, main

TABLE = Table(
    "omniglot",
    "Omniglot: 20-way accuracy",
    ("omniglot",),
    {
        "laptop": [
            Row(name, "64-64-64-64", {("omniglot", shots): f"omniglot/omniglot/conv4/{head}" for shots in (1, 5)})
            for head, name in HEADS.items()
        ]
    },
    ways=20,
)

if __name__ == "__main__":
    main(TABLE, __doc__)
