"""The rate at which solvers are right, report a failure, or are silently wrong.

`tasks.py` draws hard tasks, `contenders.py` solves them, and `judges.py` measures the error of an answer from the
features alone, in extended precision, with no code of the library. `attempts.py` runs each attempt in another process,
and `__main__.py` counts the verdicts.
"""

from benchmarks import require_modules

require_modules("mpmath", "numpy", "pebble")
