"""Comparison of batch strategies over several seeds."""
