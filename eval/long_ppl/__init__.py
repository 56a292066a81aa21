"""LongPPL: the loss on tokens that need a long context."""
