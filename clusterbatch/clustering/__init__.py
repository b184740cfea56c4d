"""Vectors to clusters to shards: k-means without Ray, the streaming assignment, the layout that training reads."""
