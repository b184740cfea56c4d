"""Figures of batches before any training."""
