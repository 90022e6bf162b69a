"""Graph passes, one a file. Each takes a model with static shapes and changes it in place."""
