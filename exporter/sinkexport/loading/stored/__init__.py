"""Quantised checkpoints: their tensors as matrices of integers and scales, and the numbers that those stand for."""
