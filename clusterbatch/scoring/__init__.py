"""A teacher's scores of pairs and of documents that may share a batch."""
