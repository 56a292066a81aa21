"""One file for each task of `python -m eval`: its options, and what it runs with them."""
