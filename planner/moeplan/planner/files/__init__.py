"""Our own files: plans, and limits on layouts."""
