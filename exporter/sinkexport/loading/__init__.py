"""Loaders of models and tokenizers behind `sinkexport.sources`, and the check of an export against their files.

checkpoints/ model folders · gguf_models/ GGUF files · tokenizers/ of both · weights/ the independent check.
"""
