"""Exact and approximate nearest neighbours, and the mining of hard negatives."""
