"""Models from GGUF files: metadata and tensors, by architecture."""
