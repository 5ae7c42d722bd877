"""Between the ranks and the planner: statistics up, agreed layouts down."""
