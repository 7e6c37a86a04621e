"""Unlabelled images to an encoder: one training loop, one module per self-supervised paper."""
