"""Which layer of one model is like which layer of another."""
