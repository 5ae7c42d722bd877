"""Judging policies and decisions on recorded traces."""
