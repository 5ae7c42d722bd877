"""Assigning tokens to experts in equal numbers (BASE layers)."""
