"""Contrastive training: loss, masks, gradient cache, the step, checkpoints, and the Ray Train wiring."""
