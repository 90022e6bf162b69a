"""Tokenizers of folders and GGUF files, to the id."""
