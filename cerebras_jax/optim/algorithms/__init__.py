"""One file for each algorithm: its state, its rule, its class."""
