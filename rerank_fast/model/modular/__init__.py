"""Cross-encoders of sentence-transformers' modules: an encoder, pooling, and layers that give one
score.
"""
