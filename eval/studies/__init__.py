"""All studies of one or two recipes, each in a folder of its own, and the page that holds them all."""
