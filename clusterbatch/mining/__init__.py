"""Nearest neighbours of every query: hard negatives to train on, pairs that are not consistent to leave out."""
