"""The question: cluster, experts, demand, limits, the layout in force; and what theory says of it before any search."""
