"""Changes of attention that need no training: per-head windows, factors on the first token, affine weights."""
