"""The tiny models of tests/training, for what of their gradients is a model's."""

from tests.training.conftest import still_bert, tiny_bert  # noqa: F401
