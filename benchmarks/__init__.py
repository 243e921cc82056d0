"""The paper's experiments: `python -m benchmarks.train` meta-trains a backbone through a head and evaluates it."""

import gym_notices.notices

# learn2learn imports gym, which would print a page about its own successor.
gym_notices.notices.notices.clear()
