"""Texts to tokens: tokenisation, the packed layout, and the planner of micro-batches."""
