"""Recorded routing: reading, describing and making it."""
