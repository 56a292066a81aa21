"""What a part of a study says, as numbers and as sentences: one file for each way to read it."""
