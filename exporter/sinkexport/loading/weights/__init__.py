"""The check of a written graph's weights against the files that they came from, without the loader."""
