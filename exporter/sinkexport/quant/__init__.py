"""Quantisation: recipes, calibration and what they do to a graph."""
