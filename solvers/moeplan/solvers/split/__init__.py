"""How an expert's tokens are divided among its replicas, for a layout that is given."""
