"""From a problem to a plan: one layer, all layers of a model under one deadline, one budget of slots."""
