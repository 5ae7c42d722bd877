"""The answer, its cost in seconds, and how hard to try for it."""
