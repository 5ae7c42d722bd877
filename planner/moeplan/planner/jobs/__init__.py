"""A job as a pure state machine: statistics in, solves and versions of layouts out."""
