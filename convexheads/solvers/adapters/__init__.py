"""Solvers from other packages, each with workarounds for the defects of its backend."""
