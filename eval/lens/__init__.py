"""What each depth of a model would predict."""
