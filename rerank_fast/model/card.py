"""The model card of a model directory: metadata and text, and what keeps foreign text from breaking
either.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packed.heads import own_class

if TYPE_CHECKING:
    from rerank_fast.model.pretrained import PretrainedModel

CARD_FILE = "README.md"
PLOT_FILE = "training.png"
TAGS = ("sentence-transformers", "cross-encoder", "reranker")
# What has a meaning in Markdown, HTML, GitHub's extensions of it or the hub's formulas.
_SPECIAL = re.compile(r"""[&<>"'`|*_\[\]()!\\#~$:@{}]|(?<=www)\.""", re.IGNORECASE)
_BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
_EXAMPLES = (
    "How many people live in Berlin?",
    (
        "Berlin had a population of 3,520,031 registered inhabitants in 2019.",
        "Berlin is well known for its museums.",
        "In 2014, the city state of Berlin had 37,368 live births.",
    ),
)


@dataclass(frozen=True)
class Card:
    """README.md of a model directory, and the picture that it shows."""

    text: str  # the front matter included
    name: str  # what its code loads: a directory's name or a hub id
    plot: bytes | None = None  # PNG

    def named(self, name: str) -> Card:
        """This card, its code loading the model by another name."""
        return replace(self, name=name, text=self.text.replace(_loads(self.name), _loads(name)))

    def with_metadata(self, metadata: Mapping[str, Any]) -> Card:
        """This card with these values in its front matter."""
        if not metadata:
            return self
        card = ModelCard(self.text, ignore_metadata_errors=True)
        if all(card.data.get(key) == value for key, value in metadata.items()):
            return self
        card.data.__dict__.update(metadata)
        return replace(self, text=str(card))

    def write(self, directory: Path) -> None:
        (directory / CARD_FILE).write_text(self.text, encoding="utf-8")
        if self.plot is not None:
            (directory / PLOT_FILE).write_bytes(self.plot)


def read_card(file: str | Path, name: str) -> Card | None:
    """The card in a file and the plot beside it; None where it is no readable text."""
    file = Path(file)
    plot = file.parent / PLOT_FILE
    try:
        text = file.read_text(encoding="utf-8-sig")
        return Card(text, name, plot.read_bytes() if PLOT_FILE in text and plot.is_file() else None)
    except (OSError, UnicodeDecodeError):
        return None


def known_metadata(card: Card | None) -> dict[str, Any]:
    """License and language as a card says them: those of a model are those of what is made from
    it.
    """
    if card is None:
        return {}
    try:
        data = ModelCard(card.text, ignore_metadata_errors=True).data
    except Exception:  # front matter that is no YAML mapping: several kinds of errors
        return {}
    keys = ("license", "license_name", "license_link", "language")
    return {key: data.get(key) for key in keys if data.get(key) is not None}


def hub_id(name_or_path: str) -> str | None:
    """The model's id on the hub, also of a directory in the hub's cache; None for any other
    directory.
    """
    cached = _CACHED.search(str(Path(name_or_path).absolute()).replace("\\", "/") + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def base_model_link(name_or_path: str) -> str:
    """The base model as a link where the hub has it, else the name of its directory."""
    base = hub_id(name_or_path)
    if base is None:
        return code(Path(name_or_path).resolve().name)
    return f"[{escape(base)}](https://huggingface.co/{base})"


def clean(text: str, limit: int | None = None) -> str:
    """One line without control or direction characters, cut to a number of characters."""
    spaced = "".join(
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text if c not in _BIDI
    )
    spaced = " ".join(spaced.split())
    return spaced if limit is None or len(spaced) <= limit else spaced[: limit - 1].rstrip() + "…"


def escape(text: str, limit: int | None = None) -> str:
    """Foreign text for Markdown and HTML: clean, with every character that has a meaning there as
    an entity.
    """
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", clean(text, limit))


def html_code(text: str, limit: int | None = None) -> str:
    return f"<code>{escape(text, limit)}</code>"


def code(text: str, limit: int | None = None) -> str:
    """For Markdown: a plain code span where nothing in the text can end it, else the same in
    HTML.
    """
    text = clean(text, limit)
    return f"`{text}`" if text and not re.search(r"[`|<>&\\$]", text) else html_code(text)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "---:"
) -> str:
    """Cells go in as they are: escape what is foreign. align is that of the columns after the
    first.
    """
    lines = [header, [":---", *[align] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loads(name: str) -> str:
    return f"CrossEncoder({json.dumps(clean(name), ensure_ascii=False)})"


def usage(name: str, query: str | None = None, documents: Sequence[str] = ()) -> str:
    """Code that scores and ranks the documents, for this package and for sentence-transformers."""
    if query is None:
        query, documents = _EXAMPLES
    literal = [json.dumps(clean(text, 160), ensure_ascii=False) for text in (query, *documents)]
    body = [
        "",
        f"model = {_loads(name)}",
        f"query = {literal[0]}",
        "documents = [",
        *(f"    {document}," for document in literal[1:]),
        "]",
        "scores = model.predict([(query, document) for document in documents])",
        "print(scores.shape)",
        f"# ({len(documents)},)",
        "ranking = model.rank(query, documents)",
        '# [{"corpus_id": ..., "score": ...}, ...], the best first',
    ]
    snippet = "```python\nfrom {} import CrossEncoder\n{}\n```"
    return "\n\n".join(
        [
            "## Usage",
            "With rerank_fast, which packs the pairs without padding:",
            snippet.format("rerank_fast", "\n".join(body)),
            "With sentence-transformers (`pip install -U sentence-transformers`):",
            snippet.format("sentence_transformers", "\n".join(body)),
        ]
    )


def _architecture(model: Any) -> str:
    """The model's class, and those of the modules behind an encoder."""
    parts = [model.encoder, *model.head] if isinstance(model, ModularReranker) else [model]
    return ", ".join(own_class(part).__name__ for part in parts)


def details(model: PretrainedModel) -> str:
    """What the model is, as a list."""
    config, metadata = model.model.config, model.card_metadata
    count = sum(parameter.numel() for parameter in model.parameters())
    parameters = f"{count / 1e6:,.1f} million" if count >= 1e6 else f"{count:,}"
    layers = getattr(config, "num_hidden_layers", None)
    shape = (
        f", {layers} layers of width {config.hidden_size}"
        if layers and hasattr(config, "hidden_size")
        else ""
    )
    kind = type(model.activation_fn)
    lines = [
        "- **Model type:** cross-encoder",
        f"- **Base model:** {base_model_link(model.name_or_path)}",
        f"- **Architecture:** {code(_architecture(model.model))}{shape}, {parameters} parameters",
        f"- **Maximum length:** {model.max_length or 'any number of'} tokens of query and document "
        "together",
        "- **Modality:** text",
        f"- **Output labels:** {model.num_labels}, a score; {code(kind.__name__)} is applied to it",
    ]
    for key in ("language", "license"):
        value = metadata.get(key)
        values = [value] if isinstance(value, str) else value or []
        said = ", ".join(escape(str(one)) for one in values) or "not stated"
        lines.append(f"- **{key.capitalize()}:** {said}")
    return "\n".join(["## Model details", "", *lines])


def sources_and_architecture(model: PretrainedModel) -> str:
    """Where the libraries that load the model are described, and the model as PyTorch prints it."""
    hub = "https://huggingface.co/models?library=sentence-transformers&other=cross-encoder"
    lines = [
        "### Model sources",
        "",
        "- **Documentation:** [Cross-encoders in Sentence Transformers]"
        "(https://www.sbert.net/docs/cross_encoder/usage/usage.html)",
        "- **Repository:** [Sentence Transformers on "
        "GitHub](https://github.com/huggingface/sentence-transformers)",
        f"- **Hugging Face:** [Cross-encoders on Hugging Face]({hub})",
        "",
        "### Full model architecture",
        "",
        "```",
        repr(model.model),
        "```",
    ]
    return "\n".join(lines)


def make_card(
    model: PretrainedModel,
    name: str,
    sections: Sequence[str],
    *,
    tags: Sequence[str] = (),
    plot: bytes | None = None,
    **metadata: Any,
) -> Card:
    """A card of Markdown sections; metadata beyond what the model itself gives is for
    ModelCardData.

    Raises:
        ValueError: the metadata is not such as the hub takes.
    """
    base = hub_id(model.name_or_path)
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="text-ranking",
        tags=[*TAGS, *tags],
        base_model=base,
        **{**metadata, **model.card_metadata},
    )
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    validate_card(text)
    return Card(text, name, plot)


def title(model: PretrainedModel) -> str:
    """Also the name under which results stand in the metadata."""
    name = hub_id(model.name_or_path) or Path(model.name_or_path).resolve().name
    return f"CrossEncoder based on {name}"


def short_card(model: PretrainedModel, name: str) -> Card:
    """The card of a model of whose training nothing is known."""
    loads = "rerank_fast, sentence-transformers and transformers"
    if isinstance(model.model, ModularReranker):
        loads = "rerank_fast and sentence-transformers"
    sentence = (
        "This is a cross-encoder: it reads a query and a document together and gives a score to "
        f"rerank by. It loads in {loads}."
    )
    return make_card(
        model, name, [f"# {escape(title(model))}", sentence, details(model), usage(name)]
    )


def validate_card(text: str) -> None:
    """What huggingface_hub can check of a card without the hub.

    That is: the front matter is found by the hub's own expression, is a YAML mapping, reads back as
    the same metadata, its results form a model-index, and base_model and datasets are possible ids.
    Whether the hub knows the license and the languages only its /api/validate-yaml says, which
    huggingface_hub asks before every upload.

    Raises:
        ValueError: names what is wrong.
    """
    card = ModelCard(text)
    data = card.data.to_dict()
    if not data:
        raise ValueError("the model card has no metadata")
    if ModelCard(str(card)).data.to_dict() != data:
        raise ValueError("the model card's metadata does not read back as it was written")
    if "model-index" in data:
        model_index_to_eval_results(data["model-index"])
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(f"{key} in the model card's metadata: {error}") from error
