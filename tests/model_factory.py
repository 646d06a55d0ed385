"""Tiny random models with real tokenizers, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

_WORDS = [
    "a",
    "an",
    "the",
    "what",
    "is",
    "are",
    "of",
    "in",
    "and",
    "or",
    "kind",
    "long",
    "question",
    "about",
    "weather",
    "sea",
    "rain",
    "wind",
    "sun",
    "panda",
    "bear",
    "fish",
    "bamboo",
    "paris",
    "france",
    "capital",
    "city",
    "museum",
    "berlin",
    "people",
    "live",
    "population",
    "eats",
    "all",
    "day",
    "that",
    "over",
    "wet",
    "no",
    "yes",
    "query",
    "document",
]
SIZES = {  # of a tiny model of any family, as configs name them
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 1,
}
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(*, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over a few dozen words and all letters, with BERT's pair template."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,?!'")
    pieces = [
        *_SPECIAL,
        *dict.fromkeys([*_WORDS, *letters, *(f"##{letter}" for letter in letters)]),
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_tiny_bert(
    directory: str | Path,
    *,
    head: bool = True,
    num_labels: int = 1,
    max_positions: int = 64,
    seed: int = 0,
) -> Path:
    """Save a 2-layer BERT of width 32 with its tokenizer; `head=False` saves the bare encoder."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        **_shape(tokenizer), max_position_embeddings=max_positions, num_labels=num_labels
    )
    torch.manual_seed(seed)
    return _save(
        BertForSequenceClassification(config) if head else BertModel(config), tokenizer, directory
    )


def make_tiny_roberta(directory: str | Path, *, seed: int = 0) -> Path:
    """Save a RoBERTa of the same shape; its positions begin at pad + 1, so 65 embeddings hold 64
    tokens.
    """
    tokenizer = make_tokenizer(model_max_length=512)
    config = RobertaConfig(
        **_shape(tokenizer),
        max_position_embeddings=65,
        num_labels=1,
        pad_token_id=0,
        type_vocab_size=2,
    )
    torch.manual_seed(seed)
    return _save(RobertaForSequenceClassification(config), tokenizer, directory)


def make_tiny_deberta(directory: str | Path, *, seed: int = 0, pooler_dropout: float = 0.0) -> Path:
    """Save a 2-layer DeBERTa-v3 of width 32: positions are in the scores of attention alone."""
    tokenizer = make_tokenizer()
    config = DebertaV2Config(
        **_shape(tokenizer),
        max_position_embeddings=64,
        num_labels=1,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        pooler_dropout=pooler_dropout,
    )
    torch.manual_seed(seed)
    return _save(DebertaV2ForSequenceClassification(config), tokenizer, directory)


def make_tiny_mpnet(directory: str | Path, *, seed: int = 0) -> Path:
    """Save a 2-layer MPNet of width 32: its 64 positions begin at pad + 1, and all layers add one
    bias.
    """
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = MPNetConfig(**_shape(tokenizer), max_position_embeddings=66, num_labels=1)
    torch.manual_seed(seed)
    return _save(MPNetForSequenceClassification(config), tokenizer, directory)


def make_tiny_qwen3(
    directory: str | Path, *, chat_template: str | None = None, tied: bool = True, seed: int = 0
) -> Path:
    """Save a 2-layer causal Qwen3 of width 32; its tokenizer knows Qwen's markers and the words yes
    and no.
    """
    tokenizer = make_tokenizer(model_max_length=384)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = chat_template
    config = Qwen3Config(
        **_shape(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return _save(Qwen3ForCausalLM(config), tokenizer, directory)


def _gemma_tokenizer() -> GemmaTokenizer:
    """Of letters and the word Yes."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *map(chr, range(33, 127)), "Ye", "Yes"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("Y", "e"), ("Ye", "s")]
    return GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=512)


def make_tiny_gemma(directory: str | Path, *, seed: int = 0) -> Path:
    """Save a 2-layer causal Gemma of width 32 as BAAI/bge-reranker-v2-gemma is published: without a
    chat template.
    """
    tokenizer = _gemma_tokenizer()
    config = GemmaConfig(
        **_shape(tokenizer), num_key_value_heads=1, head_dim=16, max_position_embeddings=512
    )
    torch.manual_seed(seed)
    return _save(GemmaForCausalLM(config), tokenizer, directory)


def make_tiny_gemma2(directory: str | Path, *, seed: int = 0) -> Path:
    """Save a Gemma 2 with a classifier: 2 layers of width 32, the first with a window, and caps
    that its scores reach.
    """
    tokenizer = _gemma_tokenizer()
    config = Gemma2Config(
        **_shape(tokenizer),
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=8,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(seed)
    return _save(Gemma2ForSequenceClassification(config), tokenizer, directory)


def make_tiny_t5(
    directory: str | Path, *, gated: bool = False, seed: int = 0, dropout: float = 0.0
) -> Path:
    """Save a T5 of two encoder layers and two decoder layers, of width 32, with a tokenizer of T5's
    kind that has the words true and false; gated is as T5 1.1, whose vocabulary is not scaled.
    """
    words = [*_WORDS, "true", "false", "Query:", "Document:", "Relevant:"]
    pieces = [*(f"▁{word}" for word in words), "▁", *map(chr, range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 - len(piece) / 100) for piece in dict.fromkeys(pieces)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
    )
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config)  # whose own weights are spread enough
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: str | Path
) -> Path:
    # The usual 0.02 leaves a tiny random model's scores all but equal: spread them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
