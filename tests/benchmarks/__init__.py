"""Scripts of benchmarks/."""
