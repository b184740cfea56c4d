"""Texts to vectors: tokenizer, backbone, pooling, and the stage that embeds a corpus."""
