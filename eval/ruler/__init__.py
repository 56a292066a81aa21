"""RULER (Hsieh et al. 2024): 13 synthetic tasks that ask for what stands anywhere in a long context."""
