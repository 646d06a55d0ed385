"""The specifications: eager PyTorch, any dtype and device, as the formulas are written."""
