"""README and docs/ say what is so: commands, links, files and snippets."""
