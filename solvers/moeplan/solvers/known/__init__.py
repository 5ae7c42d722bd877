"""Steps whose routes are known before they run, as in reinforcement learning with replayed routes."""
