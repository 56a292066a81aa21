"""What a model loses without its memory."""
