"""Slow and plain forms of what a bundle computes, which bundles are compared with."""
