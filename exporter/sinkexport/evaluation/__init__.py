"""Compare a bundle with its model: logits, perplexity, quality."""
