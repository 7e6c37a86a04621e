"""Tensors in, tensors out: no files, no logging, no hidden randomness."""
