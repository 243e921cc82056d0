"""The paper's experiments: `python -m benchmarks.train` meta-trains a backbone through a head and evaluates it."""
