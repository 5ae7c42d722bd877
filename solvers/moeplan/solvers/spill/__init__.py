"""Planning with known counts inside the rank: spill tokens of overloaded devices to transient replicas in spare slots.

Every expert has a home device that keeps its master weights. Once the router has spoken, the counts of one layer and
micro-batch are known; each rank calls the same deterministic function on the same counts and gets the same plan.
"""
