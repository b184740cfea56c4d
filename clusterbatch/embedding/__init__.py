"""The Ray stage that embeds a corpus: workers, vectors, imported vectors, character n-grams."""
