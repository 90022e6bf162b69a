"""What changes attention without training: per-head windows, factors on the first token, affine weights."""
