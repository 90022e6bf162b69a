"""Models from folders and ids of the Hub: every tensor used, every tensor there."""
