"""How deep a model works, by several measures side by side."""
