"""Placing the experts of consecutive layers together, where the same tokens ask for both."""
