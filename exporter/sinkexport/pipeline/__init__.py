"""The whole export: load, probe, trace, convert, check, write."""
