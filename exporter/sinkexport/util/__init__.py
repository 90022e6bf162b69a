"""Files, console, progress and plots."""
