"""Exact models of the placement problem, and the solvers that they are given to."""
