"""Model directories: what Hugging Face and sentence-transformers save is read and written."""

from rerank_fast.model.storage.adapters import merged_copy
from rerank_fast.model.storage.hub import create_repository, push
from rerank_fast.model.storage.reading import LoadedModel, check_prompts, load
from rerank_fast.model.storage.writing import holds_model, save

__all__ = [
    "LoadedModel",
    "check_prompts",
    "create_repository",
    "holds_model",
    "load",
    "merged_copy",
    "push",
    "save",
]
