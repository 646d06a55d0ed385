"""PEFT adapters: merged into the model that they were trained on, which lies beside them or in a
directory of its own.
"""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from rerank_fast.model.storage.files import Checkpoint, named
from rerank_fast.model.storage.weights import header
from rerank_fast.model.texts import shown

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before the names of weights in an adapter's file


def has_adapter(checkpoint: Checkpoint) -> bool:
    return checkpoint.file(_CONFIG) is not None


def adapter_base(checkpoint: Checkpoint) -> Checkpoint | None:
    """The model that an adapter is of, where the checkpoint holds nothing else.

    Raises:
        ValueError: the adapter names no model, or has no safetensors weights.
    """
    try:
        config = (
            None if checkpoint.file("config.json") is not None else checkpoint.read_json(_CONFIG)
        )
    except OSError:  # there is no such model: whoever reads its config says why
        return None
    if config is None:
        return None
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{checkpoint.name} holds a PEFT adapter and no model, and its {_CONFIG} names none: "
            f"expected base_model_name_or_path, got {shown(base)}"
        )
    if checkpoint.file(_WEIGHTS) is None:
        raise ValueError(
            f"{checkpoint.name} holds a PEFT adapter of {base} without {_WEIGHTS}; pickled weights "
            f"are not loaded: rerank-fast convert --model {checkpoint.name} --output DIR writes "
            "them as safetensors"
        )
    return replace(checkpoint, name=base, revision=None)


def merged(
    checkpoint: Checkpoint, base: Checkpoint, model: Any, missing: set[str]
) -> tuple[Any, set[str]]:
    """The model with the adapter merged into its weights, and the weights that neither of the two
    has.

    Raises:
        ValueError: PEFT is not installed, the adapter is none of this model or lacks weights, or
            is of a kind that can't be merged.
    """
    what = f"{checkpoint.name} holds a PEFT adapter " + (
        "beside the model" if base is checkpoint else f"of {base.name} and no model"
    )
    try:
        from peft import PeftModel
        from peft.utils import get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"{what}: pip install 'rerank-fast[lora]' opens it") from error
    file = checkpoint.file(_WEIGHTS)
    assert file is not None
    brought, own = set(header(file)), {f"{_PREFIX}{name}" for name in model.state_dict()}
    with named(f"{what}; it does not fit there"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are missing, which are named below
            adapted = PeftModel.from_pretrained(model, checkpoint.name, **checkpoint.hub)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if unknown := sorted(brought - expected - own):
            raise ValueError(f"the model has no weight {unknown[0].removeprefix(_PREFIX)}")
        if lacking := sorted(expected - brought):
            raise ValueError(f"it lacks the weight {lacking[0].removeprefix(_PREFIX)}")
        if not hasattr(adapted, "merge_and_unload"):
            kind = adapted.active_peft_config.peft_type
            raise ValueError(f"expected an adapter that can be merged, as LoRA, got {kind}")
        whole = adapted.merge_and_unload().eval()
    return whole, missing - {name.removeprefix(_PREFIX) for name in brought}


def adapters_in(model: nn.Module) -> list[Any]:
    """PEFT's layers in a model, and its wrappers."""
    if sys.modules.get("peft") is None:
        return []
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in model.modules() if isinstance(part, PeftModel | BaseTunerLayer)]


def merged_copy(model: Any) -> Any:
    """A copy of the model with PEFT's adapters merged into its weights; the model itself where it
    has none, or such as can't be merged.
    """
    found = adapters_in(model)
    if not found:
        return model
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not all(
        hasattr(part, "merge_and_unload" if isinstance(part, PeftModel) else "merge")
        for part in found
    ):
        return model
    holder, done = nn.ModuleList([copy.deepcopy(model)]), list[str]()
    for name, part in list(holder.named_modules()):
        if name.startswith(tuple(done)):
            continue
        whole: Any = None
        if isinstance(part, PeftModel):
            whole = part.merge_and_unload()
        elif hasattr(part, "unload_and_optionally_merge_module"):  # of modules_to_save, and others
            options: dict[str, Any] = {"safe_merge": False, "adapter_names": None}
            whole = part.unload_and_optionally_merge_module(merge=True, **options)
        elif isinstance(part, BaseTunerLayer):
            part.merge()
            whole = part.get_base_layer()
        if whole is not None:
            holder.set_submodule(name, whole)
            done.append(f"{name}.")
    for part in holder.modules():  # what lets transformers save the adapters alone
        vars(part).pop("peft_config", None)
        vars(part).pop("_hf_peft_config_loaded", None)
    return holder[0]
