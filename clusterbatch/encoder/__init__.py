"""Texts to vectors without Ray: tokenizer, backbone, pooling, model folders."""
