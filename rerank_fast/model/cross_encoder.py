"""CrossEncoder: load, predict, rank, save. Directories are exchangeable with
sentence-transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rerank_fast.model import storage
from rerank_fast.model.calls import NoCardData, with_older_names
from rerank_fast.model.card import Card, known_metadata, short_card
from rerank_fast.model.devices import choose_device
from rerank_fast.model.digest import sample_digest
from rerank_fast.model.eval_mode import EvalMode
from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packed.architectures import find_answer_head, reason_to_pad
from rerank_fast.model.packed.compilation import Compiler, check_compiler
from rerank_fast.model.padded import padded, padded_scores
from rerank_fast.model.precision.hardware import arithmetic, name_of
from rerank_fast.model.precision.int8 import quantize_linears
from rerank_fast.model.precision.names import Precision, choose_precision
from rerank_fast.model.preparation import Prepared, Preparer
from rerank_fast.model.ranking import check_lists, rankings
from rerank_fast.model.scoring import score
from rerank_fast.model.texts import Pair, check_pairs, check_text, plain
from rerank_fast.model.tokens.ahead import ahead
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.model.tokens.tokenization import CHUNK, PairTokenizer, PromptTokenizer, chunks
from rerank_fast.model.tokens.truncation import TruncationLog

logger = logging.getLogger(__name__)


class CrossEncoder(nn.Module):
    """A Hugging Face sequence-classification model with one label that scores (query, document)
    pairs.

    Opens a bare encoder (with a fresh, untrained head and one warning), any sequence-classification
    checkpoint with one label, and directories saved by sentence-transformers' CrossEncoder. A
    causal language model (Qwen3-Reranker) scores with the logits of "yes" less "no" at the end of
    its prompt, which is the tokenizer's chat template; T5 (monoT5) with those of "true" less
    "false" as its answer's first token. Weights are read from safetensors only.

    predict, rank, rank_many, score_tokens and evaluators may be called from several threads at
    once, with dropout off in all of them: the model is in evaluation mode until the last one is
    done, then each module is in its mode of before. Meanwhile change neither modes nor weights.

    Args:
        path_or_hub_id: a local directory or a model id on the Hugging Face hub.
        num_labels: must be 1.
        max_length: longest pair in tokens; longer ones are truncated, longest side first. None
            takes the smaller of the tokenizer's limit and the number of positions that the model
            has; where it has neither, nothing is truncated.
        device: None takes CUDA where there is one, else the CPU.
        dtype: of the weights; None keeps the checkpoint's own. "auto" takes the fastest that keeps
            the accuracy of bf16, by a measurement of some milliseconds on CPUs, and says which in
            the log. bf16 and fp16 weights are computed in fp32 on a CPU that only emulates theirs,
            with one line in the log. "int8" (CPUs, inference) multiplies in int8, with a scale for
            each output of the weights and one for each token, all but the score head.
        activation_fn: applied to the scores by predict and rank; None takes the saved one, else
            Sigmoid.
        trust_remote_code: run model code that the checkpoint brings along.
        revision: branch, tag or commit on the hub.
        token: hub access token.
        template: of a language model: a Jinja chat template of the roles query, document and, for
            an instruction, system, in the place of its tokenizer's. It is saved with the model.
        answers: of a language model: the words whose logits are the score, the first's less the
            second's, or one whose logit is the score; None takes those of its files, else "yes" and
            "no", of T5 "true" and "false". They are saved with the model.

    Attributes:
        prompts: texts by name, of a directory that sentence-transformers saved with some.
        default_prompt_name: of the prompt that stands for prompt=None in every method; None for no
            prompt.
        truncated_pairs: how many pairs were truncated so far, by max_length; see its docstring.

    Raises:
        ValueError: the model is missing, has no safetensors weights or tokenizer, more than one
            label, or a score head outside of the Hugging Face model; a file of it is damaged, or
            names one outside of its directory; a weight is not finite or not a float; max_length is
            below 4 or above the model's positions; dtype is none of the above; the device is not
            there; template does not carry both texts, an answer is not one token, or the model is
            no language model.
    """

    model_card_data = NoCardData()

    def __init__(
        self,
        path_or_hub_id: str | Path,
        *,
        num_labels: int = 1,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | Precision | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        template: str | None = None,
        answers: str | tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        if num_labels != 1:
            raise ValueError(f"a reranker has 1 label: expected num_labels=1, got {num_labels}")
        if not isinstance(path_or_hub_id, str | os.PathLike):
            raise ValueError(
                f"expected a model's directory or a hub id, got a {type(path_or_hub_id).__name__}"
            )
        hub: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "token": token,
        }
        device = choose_device(device)
        self._precision = choose_precision(dtype, device)
        loaded = storage.load(
            str(path_or_hub_id),
            dtype=self._precision.weights,
            template=template,
            answers=answers,
            **hub,
        )
        self.name_or_path = str(path_or_hub_id)
        self.model = loaded.model
        self.tokenizer, self._tokenizer_settings = loaded.tokenizer, loaded.tokenizer_settings
        self.answers = loaded.answers
        self.prompts = loaded.prompts
        self.default_prompt_name = loaded.default_prompt_name
        self.keep_in_fp32_modules = loaded.keep_in_fp32_modules
        self._compiler: Compiler | None = None
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
        if name == "activation_fn":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

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
            ValueError: inductor lacks a compiler here.
        """
        if backend == "inductor":
            check_compiler(self.device)
        self._compiler = backend

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

    def _prompt(self, prompt: str | None, name: str | None = None) -> str | None:
        """The one given, or that of the name, or the default one.

        Raises:
            ValueError: it is no string, or not valid Unicode; there is none of the name.
        """
        if prompt is None and (name := name or self.default_prompt_name) is not None:
            if name not in self.prompts:
                raise ValueError(
                    f"there is no prompt {name!r}: expected {', '.join(self.prompts) or 'none'}"
                )
            prompt = self.prompts[name]
        return None if prompt is None else check_text(prompt, "prompt")

    def _pair_tokenizer(self) -> PairTokenizer | PromptTokenizer:
        if self.answers is None:
            return PairTokenizer(self.tokenizer)
        encoder_decoder = bool(self.model.config.is_encoder_decoder)
        return PromptTokenizer(self.tokenizer, encoder_decoder=encoder_decoder)

    # -- text to tokens ---------------------------------------------------------------------------

    def tokenize(
        self, pairs: Iterable[Pair], *, show_progress_bar: bool = False, prompt: str | None = None
    ) -> TokenizedPairs:
        """Token ids of all pairs, without padding, truncated to max_length (the longer text first).

        That some were truncated is said once, and counted: see truncated_pairs. The prompt goes
        before each query; a language model takes it for the instruction.

        Raises:
            ValueError: an element is not a pair of strings; names its index.
        """
        tokens, truncated = self.tokenize_counting(
            pairs, show_progress_bar=show_progress_bar, prompt=prompt
        )
        self.warn_of_truncation(truncated, len(tokens))
        return tokens

    def tokenize_counting(
        self, pairs: Iterable[Pair], *, show_progress_bar: bool = False, prompt: str | None = None
    ) -> tuple[TokenizedPairs, int]:
        """The same, with the number of pairs that were truncated in place of the warning."""
        checked, prompt = check_pairs(pairs), self._prompt(prompt)
        parts, truncated = [], 0
        tokenize = self._pair_tokenizer()
        for chunk in tqdm(chunks(checked), desc="Tokenizing", disable=not show_progress_bar):
            part, cut = self._tokenized(tokenize, chunk, prompt)
            parts.append(part)
            truncated += cut
        return TokenizedPairs.concatenate(parts), truncated

    def _tokenized(
        self, tokenize: PairTokenizer | PromptTokenizer, pairs: Sequence[Pair], prompt: str | None
    ) -> tuple[TokenizedPairs, int]:
        limit = self.max_length or sys.maxsize
        tokens, truncated = tokenize(pairs, limit, prompt)
        if prompt and isinstance(tokenize, PairTokenizer) and self._leaves_prompt_out():
            tokens = replace(tokens, prompt_length=tokenize.prompt_length(prompt))
        rows = getattr(self.model.config, "vocab_size", None)
        number = int(tokens.input_ids.max(initial=0))
        if isinstance(rows, int) and number >= rows:  # on a GPU a look-up of it ends the process
            raise ValueError(
                f"a text has the token {self.tokenizer.convert_ids_to_tokens(number)!r} with the "
                f"number {number}, and the model has embeddings for {rows}"
            )
        self._truncation.count(truncated, limit)
        return tokens, truncated

    def _leaves_prompt_out(self) -> bool:
        """Whether pooling passes a prompt's tokens over."""
        head = self.model.head if isinstance(self.model, ModularReranker) else ()
        return any(getattr(one, "include_prompt", True) is False for one in head)

    def tokenization_key(self) -> tuple[Any, ...]:
        """What tokenize depends on beside the pairs: with equal keys it gives equal tokens.

        A fast tokenizer holds how it was last called: a key is taken after the call it stands for.
        """
        state: Any
        try:
            state = hashlib.sha256(pickle.dumps(self.tokenizer)).digest()
        except (
            Exception
        ):  # of as many kinds as there are parts of somebody's own: it equals no other
            state = object()
        return self.max_length, self._prompt(None), state

    def warn_of_truncation(self, truncated: int, total: int) -> None:
        """One warning of how many pairs were truncated, if any were and none was said yet."""
        self._truncation.warn(truncated, total, self.max_length or sys.maxsize)

    def preprocess(
        self, pairs: Sequence[Pair], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """One padded batch of the pairs, on the host; the prompt as tokenize has it."""
        tokens = self.tokenize(pairs, prompt=prompt)
        return padded(tokens, np.arange(len(tokens)), self.model, self.tokenizer)

    # -- tokens to scores -------------------------------------------------------------------------

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw scores (logits) of one padded batch: {"scores": (B,) fp32}."""
        head = None if self.answers is None else find_answer_head(self.model, self.answers)
        return {"scores": padded_scores(self.model, features, self.answers, head)}

    def prepare(
        self, tokens: TokenizedPairs, *, dtype: torch.dtype | None = None, packed: bool = True
    ) -> Prepared:
        """The pairs made ready for `rerank_fast.score`, packed where the architecture allows it.

        Args:
            tokens: from tokenize.
            dtype: of matrix products and attention; None takes the model's. bf16 beside fp32
                weights is what autocast does.
            packed: False pads whatever the architecture.

        Returns:
            The pairs with the weights as they are now; after an optimizer's step they are prepared
            anew.

        Raises:
            ValueError: a pair has no token; names it.
        """
        return self.preparer(dtype=dtype, packed=packed)(tokens)

    def preparer(
        self,
        *,
        dtype: torch.dtype | None = None,
        packed: bool = True,
        adds_gradients: bool = False,
        graph_seed: int | None = None,
    ) -> Preparer:
        """What prepares batch after batch while the model's modules stay what they are: finds its
        parts once.
        """
        return Preparer(
            self.model,
            self.tokenizer,
            dtype=dtype or self._dtype_of_steps,
            packed=packed,
            packed_dtype=self._precision.compute,
            answers=self.answers,
            compiler=self._compiler,
            adds_gradients=adds_gradients,
            graph_seed=graph_seed,
        )

    @contextlib.contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, scores are computed in this dtype, as bf16 beside fp32 weights: a run's
        evaluation.
        """
        before, self._dtype_of_steps = self._dtype_of_steps, dtype
        try:
            yield
        finally:
            self._dtype_of_steps = before

    @torch.inference_mode()
    def score_tokens(
        self,
        tokens: TokenizedPairs,
        *,
        batch_size: int | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """(N,) fp32 scores of tokenised pairs on the model's device, in their order, dropout off.

        batch_size is the most pairs per forward pass; None lets their tokens decide.
        """
        scores = self._scores(iter([tokens]), len(tokens), batch_size, show_progress_bar)
        return self._activate(scores, activation_fn)

    def _activate(self, scores: Tensor, activation_fn: Callable[[Tensor], Tensor] | None) -> Tensor:
        activation: Any = activation_fn or self.activation_fn
        return activation(scores)

    def _scores(
        self,
        chunks: Iterator[TokenizedPairs],
        total: int,
        batch_size: int | None,
        show_progress_bar: bool,
    ) -> Tensor:
        """(total,) fp32 raw scores of the pairs of all chunks; one chunk's are in flight while the
        next is made.
        """
        batch_size = plain(batch_size)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        scores = torch.empty(total, dtype=torch.float32, device=self.device)
        done = 0
        bar = tqdm(total=total, desc="Scoring", disable=not show_progress_bar)
        with self._eval_mode.of(self), bar:
            prepare = self.preparer()
            for tokens in chunks:
                scores[done : done + len(tokens)] = score(
                    prepare(tokens), max_pairs=batch_size, progress=bar.update
                )
                done += len(tokens)
        return scores

    def _tokenized_chunks(
        self, pairs: Sequence[Pair], prompt: str | None
    ) -> Iterator[TokenizedPairs]:
        truncated, tokenize = 0, self._pair_tokenizer()
        parts = (self._tokenized(tokenize, chunk, prompt) for chunk in chunks(pairs))
        if len(pairs) > CHUNK:  # for one part a thread would only cost
            parts = ahead(parts)
        for tokens, cut in parts:
            truncated += cut
            yield tokens
        self.warn_of_truncation(truncated, len(pairs))

    @torch.inference_mode()
    @with_older_names
    def predict(
        self,
        inputs: Iterable[Pair] | Pair,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Scores of (query, document) pairs, in their order; called as that of
        sentence-transformers.

        Args:
            inputs: N pairs of strings, or one pair: lists, arrays, a Series of pairs, a DataFrame
                of two columns or of the columns query and document, zip objects and other iterators
                that come to an end.
            prompt_name: of the model's prompts, instead of prompt.
            prompt: goes before each query; the instruction of a language model. None takes the
                model's default prompt, if it has one.
            batch_size: most pairs per forward pass; None lets their tokens decide.
            show_progress_bar: None shows it when INFO messages are logged.
            activation_fn: instead of the model's own.
            apply_softmax: is over a model's labels, of which there is one: it changes nothing.
            convert_to_numpy: return a (N,) fp32 array; else a list of 0-dim tensors.
            convert_to_tensor: return a (N,) fp32 tensor on the model's device.

        Returns:
            The scores; a single value for one pair.

        Raises:
            ValueError: an element is not a pair of strings, names its index; there is no prompt of
                this name.
            MemoryError: a batch does not fit memory, nor does half of it.
        """
        pairs = plain(inputs)
        two = isinstance(pairs, list | tuple) and len(pairs) == 2
        single = two and all(isinstance(plain(text), str) for text in pairs)
        batch = check_pairs([pairs] if single else pairs)  # all, before any is scored
        prompt = self._prompt(prompt, prompt_name)
        if show_progress_bar is None:
            show_progress_bar = logger.isEnabledFor(logging.INFO)
        scores = self._scores(
            self._tokenized_chunks(batch, prompt), len(batch), batch_size, show_progress_bar
        )
        scores = self._activate(scores, activation_fn)
        if convert_to_tensor:
            return scores[0] if single else scores
        if convert_to_numpy:
            array = scores.cpu().numpy()  # the one transfer to the host
            return array[0] if single else array
        return scores[0] if single else list(scores)

    @with_older_names
    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by descending score, ties in input order; called as that of
        sentence-transformers.

        Returns:
            The top_k of them, each with "corpus_id" (an index of documents), "score" (a float) and,
            with return_documents, "text".
        """
        options: dict[str, Any] = {
            "prompt_name": prompt_name,
            "prompt": prompt,
            "batch_size": batch_size,
        }
        options |= {"show_progress_bar": show_progress_bar, "activation_fn": activation_fn}
        return self.rank_many([query], [documents], top_k, return_documents, **options)[0]

    def rank_many(
        self,
        queries: Iterable[str],
        documents_per_query: Iterable[Iterable[str]],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """rank() for every query, all pairs in one stream: many short lists cost what one long list
        does.

        Raises:
            ValueError: queries and lists of documents differ in number; top_k is below 1; a text is
                no string.
        """
        queries, lists = check_lists(queries, documents_per_query, top_k)
        if not queries:
            return []
        pairs = [
            (query, document)
            for query, docs in zip(queries, lists, strict=True)
            for document in docs
        ]
        all_scores = self.predict(
            pairs,
            prompt_name,
            prompt,
            batch_size=batch_size,
            activation_fn=activation_fn,
            show_progress_bar=show_progress_bar,
        )
        return rankings(all_scores, lists, top_k, return_documents)

    # -- to disk and hub --------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write safetensors weights, config, tokenizer, sentence-transformers' files and a card to
        a directory.

        README.md is the card that the model was loaded with or trained to, else a short one. Set
        `card_metadata["license"]`, `["language"]` or any other key of the hub's metadata
        beforehand.

        Raises:
            ValueError: the directory holds a model and overwrite is False, or can't be written.
        """
        self.save_as(Path(path), Path(path).resolve().name, overwrite=overwrite)

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
            self.model if model is None else model,
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
