"""Which kind of experts a layer should have, by the cost model: resident ones that spill, sharded ones, or both."""
