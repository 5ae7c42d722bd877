"""Layouts built in one go, and their parts: replica counts, packing, repair to what the limits allow."""
