"""The torch side of an export: what is traced."""
