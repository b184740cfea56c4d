"""Spherical k-means, user groups and communities: from vectors to cluster numbers."""
