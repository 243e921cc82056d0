"""How often solvers are right, how often they say that they failed, and how often they are wrong without a word.

`tasks.py` draws hard tasks, `contenders.py` solves them, `judges.py` says how good an answer is: from the features
alone, in extended precision, with no code of the library. `__main__.py` runs all of it in processes of their own.
"""

from benchmarks import require_modules

require_modules("mpmath", "numpy", "pebble")
