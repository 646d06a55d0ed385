"""Triton kernels, one file a family. Importing one imports triton; guard.py does not."""
