"""Whole models: replacing their experts, checkpoints."""
