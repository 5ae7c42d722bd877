"""Division of an expert's tokens among its replicas, for a layout that is given."""
