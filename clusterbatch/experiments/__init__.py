"""Whole runs as units: the run command and its report."""
