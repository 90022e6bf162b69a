"""Ranges of a model's activations over a text, and rounding of weights that looks at them."""
