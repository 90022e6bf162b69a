"""Quantised matmuls and embeddings, in the form that each target runs fast."""
