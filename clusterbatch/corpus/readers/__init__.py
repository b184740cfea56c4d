"""Readers: one slice of an input file becomes chunks of rows with canonical column names."""
