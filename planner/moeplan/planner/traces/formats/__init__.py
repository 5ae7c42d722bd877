"""Recordings of serving engines and training frameworks, one file per format."""
