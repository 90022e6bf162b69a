"""Find a model's sinks, per-head windows and factors on attention."""
