"""Worker processes that solve, and how the daemon talks to them."""
