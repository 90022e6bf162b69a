"""Scripts that keep the repository: generated docs, hooks of the docs site."""
