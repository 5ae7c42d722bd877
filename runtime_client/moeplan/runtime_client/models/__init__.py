"""Whole models: replacing their experts, gradients, checkpoints."""
