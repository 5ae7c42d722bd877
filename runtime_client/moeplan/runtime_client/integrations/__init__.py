"""Adapters: one file per framework or engine that others already use, and what the adapters share."""
