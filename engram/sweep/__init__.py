"""Many runs from one file, and what they say about sharing a budget between experts and memory."""
