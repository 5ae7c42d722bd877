"""The MoE pass on GPUs without the host: symmetric memory, kernels, the mailbox of the planner, and the pass itself."""
