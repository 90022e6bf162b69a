"""What `sinkexport.sources` loads models and tokenizers with, and what checks an export against their files.

checkpoints/ model folders · gguf_models/ GGUF files · tokenizers/ of both · weights/ the independent check.
"""
