"""Searches that improve a layout: exchanges of replicas, and neighbourhoods solved exactly."""
