"""CrossEncoder: tokens to scores. Text to tokens: tokenizing.py; opening and saving:
pretrained.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rerank_fast.model.calls import with_older_names
from rerank_fast.model.packed.architectures import find_answer_head
from rerank_fast.model.packed.graphs import has_graphs
from rerank_fast.model.padded import padded_scores
from rerank_fast.model.preparation import Prepared, Preparer
from rerank_fast.model.ranking import check_lists, rankings
from rerank_fast.model.scoring import score
from rerank_fast.model.texts import Pair, check_pairs, plain
from rerank_fast.model.tokenizing import TokenizingModel
from rerank_fast.model.tokens.packing import TokenizedPairs

logger = logging.getLogger(__name__)


class CrossEncoder(TokenizingModel):
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
        num_labels: must be 1, or None.
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
        prompts: texts by name, beside and before those of its files. They are saved with the model.
        default_prompt_name: of the prompt that stands for prompt=None; None takes the saved one.
        cache_folder: where the hub's files are kept; None takes the usual place.
        local_files_only: ask the hub for nothing.
        model_kwargs: attn_implementation, of padded execution, or dtype.
        processor_kwargs: for transformers' AutoTokenizer.from_pretrained.
        config_kwargs: for transformers' AutoConfig.from_pretrained, as classifier_dropout.
        keep_in_fp32_modules: linear layers that compute in fp32 whatever the dtype, by
            sentence-transformers' names ("0.model.classifier"); None takes the saved ones.

    sentence-transformers' arguments under older names, and the first four by position, are taken
    too. Its names for methods and attributes are there: config, dtype, max_seq_length, save, ...

    Attributes:
        prompts: texts by name, saved or given.
        default_prompt_name: of the prompt that stands for prompt=None in every method; None for no
            prompt.
        truncated_pairs: how many pairs were truncated so far, by max_length.

    Raises:
        ValueError: the model is missing, has no safetensors weights or tokenizer, more than one
            label, or a score head outside of the Hugging Face model; a file of it is damaged, or
            names one outside of its directory; a weight is not finite or not a float; max_length is
            below 4 or above the model's positions; dtype is none of the above; the device is not
            there; template does not carry both texts, an answer is not one token, or the model is
            no language model; an argument of sentence-transformers is not served, as modules.
    """

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
        captures: bool = False,
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
            captures=captures,
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
        return self.activated(scores, activation_fn)

    def activated(self, scores: Tensor, activation_fn: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(N,) scores after an activation, the model's own for None. It sees (N, 1), a column for
        each label.
        """
        activation = self.activation_fn if activation_fn is None else activation_fn
        return activation(scores[:, None]).reshape(-1)

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
            captured = self._captured if has_graphs(self.device) else None
            prepare = self.preparer() if captured is None else captured.preparer(self)
            for tokens in chunks:
                scores[done : done + len(tokens)] = score(
                    prepare(tokens), max_pairs=batch_size, progress=bar.update
                )
                done += len(tokens)
        return scores

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
        scores = self.activated(scores, activation_fn)
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

        Args:
            query: one text.
            documents: D texts.
            top_k: how many of the best to return; None returns all.
            return_documents: give each hit its text.
            prompt_name: of the model's prompts, instead of prompt.
            prompt: goes before the query; the instruction of a language model. None takes the
                model's default prompt, if it has one.
            batch_size: most pairs per forward pass; None lets their tokens decide.
            show_progress_bar: None shows it when INFO messages are logged.
            activation_fn: instead of the model's own.

        Returns:
            The top_k of them, each with "corpus_id" (an index of documents), "score" (a float) and,
            with return_documents, "text".

        Raises:
            ValueError: a text is no string; top_k is below 1; there is no prompt of this name.
            MemoryError: a batch does not fit memory, nor does half of it.
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
        """Each query's documents by descending score, all pairs in one stream: many short lists
        cost what one long list does.

        Args:
            queries: Q texts.
            documents_per_query: Q lists of texts, which may differ in length and be empty.
            top_k: how many of the best of each list to return; None returns all.
            return_documents: give each hit its text.
            prompt_name: of the model's prompts, instead of prompt.
            prompt: goes before each query; the instruction of a language model. None takes the
                model's default prompt, if it has one.
            batch_size: most pairs per forward pass; None lets their tokens decide.
            show_progress_bar: None shows it when INFO messages are logged.
            activation_fn: instead of the model's own.

        Returns:
            For each query what rank gives: a list of {"corpus_id", "score"}, ties in input order.

        Raises:
            ValueError: queries and lists of documents differ in number; top_k is below 1; a text is
                no string; there is no prompt of this name.
            MemoryError: a batch does not fit memory, nor does half of it.
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
