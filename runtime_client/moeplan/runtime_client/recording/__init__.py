"""Counting what routers choose, without changing the training."""
