"""Which kind of experts a layer should have, by the cost model: fully sharded ones, or resident ones that spill."""
