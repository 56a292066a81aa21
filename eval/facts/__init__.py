"""What a model has learned of a world of invented facts, and what it can read: questions with known chance."""
