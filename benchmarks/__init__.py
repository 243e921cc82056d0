"""The paper's experiments: `python -m benchmarks.train` meta-trains a backbone through a head and evaluates it."""

from convexheads.errors import MissingDependencyError

try:
    import gym_notices.notices
except ImportError as error:
    raise MissingDependencyError("learn2learn", "bench", "python -m benchmarks") from error

# learn2learn imports gym, which would print a page about its own successor.
gym_notices.notices.notices.clear()
