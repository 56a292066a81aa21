"""Many tasks from one file, and what lm-eval brings."""
