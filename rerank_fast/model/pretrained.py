"""A model's directory, opened and written; exchangeable with sentence-transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.model import storage
from rerank_fast.model.calls import split_dtype, with_their_options
from rerank_fast.model.captured import CapturedScoring
from rerank_fast.model.card import Card, known_metadata, short_card
from rerank_fast.model.devices import choose_device
from rerank_fast.model.digest import sample_digest
from rerank_fast.model.eval_mode import EvalMode
from rerank_fast.model.packed.architectures import reason_to_pad
from rerank_fast.model.packed.compilation import Compiler, check_compiler
from rerank_fast.model.packed.graphs import has_graphs
from rerank_fast.model.precision.hardware import arithmetic, name_of
from rerank_fast.model.precision.int8 import quantize_linears
from rerank_fast.model.precision.names import Precision, choose_precision
from rerank_fast.model.same_names import SameNames
from rerank_fast.model.texts import plain
from rerank_fast.model.tokens.tokenization import PairTokenizer, PromptTokenizer
from rerank_fast.model.tokens.truncation import TruncationLog


class PretrainedModel(SameNames, nn.Module):
    """A Hugging Face model with its tokenizer and settings, opened and saved.

    It scores nothing yet: that, and the docs of all arguments and attributes, are CrossEncoder's.
    """

    @with_their_options
    def __init__(
        self,
        path_or_hub_id: str | Path,
        *,
        num_labels: int | None = 1,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | Precision | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        template: str | None = None,
        answers: str | tuple[str, str] | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        cache_folder: str | Path | None = None,
        local_files_only: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
    ) -> None:
        super().__init__()
        for labels in (num_labels, (config_kwargs or {}).get("num_labels")):
            if labels not in (None, 1):
                raise ValueError(f"a reranker has 1 label: expected num_labels=1, got {labels}")
        if not isinstance(path_or_hub_id, str | os.PathLike):
            raise ValueError(
                f"expected a model's directory or a hub id, got a {type(path_or_hub_id).__name__}"
            )
        dtype, model_kwargs = split_dtype(dtype, model_kwargs)
        device = choose_device(device)
        self._precision = choose_precision(dtype, device)
        loaded = storage.load(
            str(path_or_hub_id),
            dtype=self._precision.weights,
            template=template,
            answers=answers,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            model_kwargs=model_kwargs,
            processor_kwargs=processor_kwargs,
            config_kwargs=config_kwargs,
            keep_in_fp32_modules=keep_in_fp32_modules,
        )
        self.name_or_path = str(path_or_hub_id)
        self.model = loaded.model
        self.tokenizer, self._tokenizer_settings = loaded.tokenizer, loaded.tokenizer_settings
        self.answers = loaded.answers
        given, _ = storage.check_prompts(prompts or {}, None, "CrossEncoder")
        self.prompts, self.default_prompt_name = storage.check_prompts(
            loaded.prompts | given,
            default_prompt_name or loaded.default_prompt_name,
            "CrossEncoder",
        )
        self.keep_in_fp32_modules = loaded.keep_in_fp32_modules
        self._compiler: Compiler | None = None
        self._captured: CapturedScoring | None = None
        self._dtype_of_steps: torch.dtype | None = None
        self._eval_mode = EvalMode()
        self._truncation = TruncationLog()
        # a language model without a template that carries a pair is refused now
        self._pair_tokenizer()
        if self._precision.int8:
            quantize_linears(self.model)
        self._max_positions = loaded.max_positions
        # An encoder's card says nothing of the reranker that is made from it, but its license holds
        # on.
        self.card = loaded.card if loaded.has_head else None
        self.card_metadata = known_metadata(loaded.card)
        self.max_length = loaded.max_length if max_length is None else max_length
        # Set past nn.Module, which would register a module's parameters as the model's own.
        object.__setattr__(
            self, "activation_fn", activation_fn or loaded.activation_fn or nn.Sigmoid()
        )
        self.to(device)
        self.eval()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation_fn":  # None is none
            object.__setattr__(self, name, nn.Identity() if value is None else value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What to(), half() and their like do to each tensor; buffers that no file has, as the
        frequencies of rotary positions, keep their dtype, as they do where a file is opened in
        another one.
        """
        kept = {
            id(module._buffers.get(name))
            for module in self.modules()
            for name in module._non_persistent_buffers_set
        }

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            keeps = new.dtype != tensor.dtype and id(tensor) in kept
            return tensor.to(new.device) if keeps else new

        return super()._apply(moved, recurse)

    @property
    def max_length(self) -> int | None:
        """Longest pair in tokens, special tokens included; None where there is no limit."""
        return self._max_length

    @max_length.setter
    def max_length(self, value: int | None) -> None:
        value = plain(value)
        if value is None:
            value = self._max_positions
        elif not isinstance(value, int) or value < 4:
            raise ValueError(
                f"max_length must leave room for two texts and their separators, got {value!r}"
            )
        elif self._max_positions is not None and value > self._max_positions:
            raise ValueError(
                f"max_length is {value}, but {self.name_or_path} has {self._max_positions} "
                "positions"
            )
        self._max_length = value

    @property
    def card(self) -> Card | None:
        """README.md as it will be saved; None, for a short one, once the weights are others than
        those it is of.
        """
        return (
            self._card
            if self._card is not None and self._digest() == self._digest_of_card
            else None
        )

    @card.setter
    def card(self, value: Card | None) -> None:
        self._card, self._digest_of_card = value, None if value is None else self._digest()

    def _digest(self) -> str:
        # In bf16: a card stays with its model where only the dtype changes.
        return sample_digest(dict(self.model.named_parameters()), torch.bfloat16)

    @property
    def truncated_pairs(self) -> dict[int, int]:
        """How many pairs were longer than max_length and truncated so far, {max_length: pairs}.

        They are counted in every method that takes texts, and in training and evaluation; a
        warning is logged at the first of each max_length only. Ask
        `model.truncated_pairs.get(model.max_length, 0)` before and after a call for its own.
        """
        return dict(self._truncation.truncated)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype_name(self) -> str:
        """Of the arithmetic: float32, bfloat16, float16 or int8."""
        if self._precision.int8:
            return "int8"
        own = arithmetic(next(self.model.parameters()).dtype, self.device)
        return name_of(self._dtype_of_steps or own)

    @property
    def num_labels(self) -> int:
        return 1

    def compile(self, *, backend: Compiler = "inductor") -> None:
        """From now on run the layers of packed execution through torch.compile; padded execution
        stays eager.

        The first steps build the kernels. Lengths and numbers of pairs are symbols in them: other
        batches build no more. On a CPU only steps with gradients are compiled.

        Raises:
            ValueError: inductor lacks a compiler here, or CUDA graphs are captured.
        """
        if self._captured is not None:
            raise ValueError("CUDA graphs must be off where layers are compiled: use one of both")
        if backend == "inductor":
            check_compiler(self.device)
        self._compiler = backend

    def capture_graphs(self, on: bool = True) -> None:
        """From now on predict, rank, score_tokens and evaluators replay CUDA graphs of the layers,
        where a batch has 16,384 tokens at most: a few pairs are scored in the time of some
        launches. Experimental, on an NVIDIA GPU.

        Numbers of tokens and pairs are rounded up by a quarter at most, to buckets; the first batch
        of each is captured, which takes as long as several batches. Of 64 buckets the graphs are
        kept, in memory that they share. They are captured anew where weights lie elsewhere, and not
        where their values are others. Adapters and hooks must be there before.

        Args:
            on: False forgets them.

        Raises:
            ValueError: the device is none of NVIDIA's, compile() was called, or a part of the model
                can't be captured; it is named.
        """
        if not on:
            self._captured = None
            return
        if not has_graphs(self.device):
            raise ValueError(f"CUDA graphs need an NVIDIA GPU, got a model on {self.device}")
        if self._compiler is not None:
            raise ValueError("CUDA graphs must be off where layers are compiled: use one of both")
        captured = CapturedScoring()
        captured.preparer(self).scoring()
        self._captured = captured

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute activations in the backward pass: less memory, more time."""
        inner: Any = self.model
        if not getattr(inner, "supports_gradient_checkpointing", True) and not reason_to_pad(
            inner, self.answers
        ):
            inner.gradient_checkpointing = True  # packed layers need nothing of transformers for it
        elif hasattr(
            inner, "activation_checkpointing_enable"
        ):  # transformers' newer name; the older one warns
            inner.activation_checkpointing_enable(gradient_checkpointing_kwargs)
        else:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def _pair_tokenizer(self) -> PairTokenizer | PromptTokenizer:
        if self.answers is None:
            return PairTokenizer(self.tokenizer)
        encoder_decoder = bool(self.model.config.is_encoder_decoder)
        return PromptTokenizer(self.tokenizer, encoder_decoder=encoder_decoder)

    # -- to disk and hub --------------------------------------------------------------------------

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        *,
        overwrite: bool = False,
        safe_serialization: bool = True,
    ) -> None:
        """Write safetensors weights, config, tokenizer, sentence-transformers' files and a card to
        a directory.

        PEFT's adapters are merged into the weights that are written, and stay as they are in the
        model. README.md is the card that the model was loaded with or trained to, else a short
        one. Set `card_metadata["license"]`, `["language"]` or any other key of the hub's metadata
        beforehand.

        Args:
            path: of the directory.
            model_name: as the card's code opens it; None takes the directory's name.
            overwrite: replace a model that is there.
            safe_serialization: must be True.

        Raises:
            ValueError: the directory holds a model and overwrite is False, or can't be written.
        """
        if not safe_serialization:
            raise ValueError(
                "weights are saved as safetensors alone: expected safe_serialization=True"
            )
        name = model_name or Path(path).resolve().name
        self.save_as(Path(path), name, overwrite=overwrite)

    def save_as(
        self, directory: Path, name: str, *, overwrite: bool = False, model: Any = None
    ) -> None:
        """save_pretrained under a name that its card gives, with another model's weights than its
        own if given.
        """
        if self._precision.int8:
            raise ValueError(
                "int8 weights are for inference and can't be saved; load the model with another "
                "dtype"
            )
        card = (self.card or short_card(self, name)).named(name).with_metadata(self.card_metadata)
        storage.save(
            storage.merged_copy(self.model) if model is None else model,
            self.tokenizer,
            self.activation_fn,
            self.max_length,
            card,
            directory,
            tokenizer_settings=self._tokenizer_settings,
            entries=getattr(self.model, "entries", ()),
            answers=self.answers,
            encoder_decoder=bool(self.model.config.is_encoder_decoder),
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            keep_in_fp32_modules=self.keep_in_fp32_modules,
            overwrite=overwrite,
        )

    def push_to_hub(
        self, repo_id: str, *, private: bool = True, token: str | bool | None = None
    ) -> str:
        """Upload what save_pretrained writes to the hub, to a private repository unless told
        otherwise.

        Args:
            repo_id: user/name or organization/name; made where it is not there, else as public as
                it is.
            private: of a repository that is made.
            token: hub access token; None takes HF_TOKEN or that of `hf auth login`.

        Returns:
            The commit's URL.

        Raises:
            ValueError: the hub is offline or refuses.
        """
        return storage.push(
            lambda directory: self.save_as(directory, repo_id),
            repo_id,
            private=private,
            token=token,
        )
