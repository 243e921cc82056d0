"""Solvers of this library: active set, interior point, ADMM, and the default composition of them."""
