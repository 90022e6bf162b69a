"""Measure a bundle: time, memory, the bytes of a step, and the machine that ran it."""
