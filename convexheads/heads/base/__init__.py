"""The base classes of heads, their inputs and their results."""
