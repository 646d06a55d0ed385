"""Names of weights: what wrappers have put before them in a file, and what a file lacks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

# torch.compile, FSDP, activation checkpointing and DeepSpeed: they wrap layers too, so anywhere in
# a name.
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_original_module)\."
)
_MODULE = re.compile(r"(?:^|(?<=\.))module\.")
_MAX_DEPTH = (
    4  # of wrappers around a whole model: DistributedDataParallel, a trainer's own module, ...
)


def unwrapped(names: Collection[str], expected: Collection[str], base: str) -> dict[str, str]:
    """Names in a file, each with what it is without the parts that wrappers have put into it.

    What DistributedDataParallel ("module."), trainers ("model.", "0.auto_model.") and others put
    before all names is found by what follows it: it need not be known.

    Args:
        names: of the tensors in a checkpoint's files.
        expected: of the model's.
        base: base_model_prefix, which names of a bare encoder lack.

    Raises:
        ValueError: two tensors come to one name, or two prefixes hold a model each.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    own = {*expected, *(name.removeprefix(f"{base}.") for name in expected)}
    # DataParallel goes around single parts too.
    if not any("module" in name.split(".") for name in own):
        plain = {name: _MODULE.sub("", short) for name, short in plain.items()}
    prefixes: Counter[str] = Counter()
    for name in plain.values():
        parts = name.split(".")
        ends = (
            depth for depth in range(min(_MAX_DEPTH, len(parts))) if ".".join(parts[depth:]) in own
        )
        if (depth := next(ends, None)) is not None:
            prefixes[".".join([*parts[:depth], ""])] += 1
    (prefix, count), *others = prefixes.most_common(2) or [("", 0)]
    if others and others[0][1] == count:
        raise ValueError(
            f"its files hold {count} weights of the model under {_shown(prefix)} and as many "
            f"under {_shown(others[0][0])}: expected one model"
        )
    short_names = {name: short.removeprefix(prefix) for name, short in plain.items()}
    first: dict[str, str] = {}
    for name, short in short_names.items():
        if (other := first.setdefault(short, name)) != name:
            raise ValueError(f"its files hold {short} twice: as {other} and as {name}")
    return short_names


def _shown(prefix: str) -> str:
    return repr(prefix) if prefix else "no prefix"


def _of_encoder(model: Any, names: Iterable[str]) -> list[str]:
    """Those of the names that are the encoder's: neither head nor pooler."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return sorted(
        name for name in names if name.startswith(prefix) and "pooler" not in name.split(".")
    )


def check_encoder(name: str, model: Any, missing: Collection[str], names: Collection[str]) -> None:
    """That a checkpoint holds a whole encoder.

    Args:
        name: of the checkpoint.
        model: as it was loaded.
        missing: the model's weights that are not in the files.
        names: of the tensors in the files.

    Raises:
        ValueError: the encoder lacks weights; counts them.
    """
    lacking = _of_encoder(model, missing)
    if lacking:
        of = len(_of_encoder(model, model.state_dict()))
        there = f"; they hold {len(names)} tensors, as {sorted(names)[0]}" if names else ""
        raise ValueError(
            f"{name}: {len(lacking)} of the encoder's {of} weights are not in its files, as "
            f"{lacking[0]}{there}"
        )


def named_shortly(names: Collection[str]) -> str:
    """The first names, and how many others there are."""
    return ", ".join(sorted(names)[:4]) + (
        f" and {len(names) - 4} others" if len(names) > 4 else ""
    )
