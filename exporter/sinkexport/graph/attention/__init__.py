"""Sink attention in standard ONNX operators: a step, a chunk, a block, with and without an INT8 window."""
