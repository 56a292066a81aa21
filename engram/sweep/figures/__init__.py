"""Drawings of what a study says, each with the numbers behind it."""
