"""The planner service: server, jobs that live in it, store, security and metrics."""
