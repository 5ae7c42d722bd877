"""Layouts as serving engines load them, one file per engine: written from a plan, and read back to be judged."""
