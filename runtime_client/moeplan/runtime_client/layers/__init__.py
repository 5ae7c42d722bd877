"""MoE layers that execute layouts: sharded and resident experts, and what both are made of."""
