"""Packed execution: tokens of all pairs in one run, through the parts of a Hugging Face model."""
