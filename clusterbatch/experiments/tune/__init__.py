"""Choice of the cluster size, the embedding model and the refresh interval by short trials."""
