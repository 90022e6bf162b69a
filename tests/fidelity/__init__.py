"""What comes in must be what goes out: checkpoints, GGUF, tokenizers, templates, requests. See docs/fidelity.md."""
