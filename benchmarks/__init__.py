"""Benchmarks on the miniature: the quality of merges, and the plots of it."""
