"""What a model is trained by: flat scores, labels and offsets of lists in, one loss out. See `Objective`."""
