"""What `sinkexport.sources` loads models and tokenizers with: folders in one module, GGUF files in others."""
