"""When and for what the memory opens."""
