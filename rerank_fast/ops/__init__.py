"""Tensors in, tensors out: the ops and their backends."""
