"""The solvers of this library: active-set Newton, interior point, ADMM, and the default composition of them."""
