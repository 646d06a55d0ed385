"""The card of a run: what it says against what the run did, its code as printed, and hostile text
inside it.
"""

from __future__ import annotations

import json
import re
import socket
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard

from rerank_fast import CrossEncoder, Trainer, TrainingConfig
from rerank_fast.cards import results as card_results
from rerank_fast.cards import run as model_card
from rerank_fast.cards.energy import Energy, EnergyMeter
from rerank_fast.data.lists import ListStream, names_of
from rerank_fast.evaluation import NanoBEIREvaluator, RerankingEvaluator
from rerank_fast.model.card import Card, clean, escape, hub_id, validate_card
from tests.model_factory import make_tiny_bert
from tests.stand_ins import make_nano_beir
from tests.training.conftest import make_lists

HOSTILE = [
    "</code></td></tr></table></details><script>alert(1)</script>",
    "| a | b |\n|---|---|\n---\nlicense: evil\n---\n# heading",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png) <http://evil.example> "
    "www.evil.example a@evil.example",
    "```\n</details>\n``` ~~~ `code` **bold** _it_ ~~gone~~ $$\\frac{1}{0}$$ \\| &lt;b&gt; {{ 7*7 "
    "}} {% x %}",
    "\u202egnp.exe\u202c \x00\x1b[31m \u2028 \r\n\r\n<img src=x onerror=alert(1)>",
    '<!-- --> <a href="x">y</a> \'"; import os; os.abort() #',
]


def train(directory: Path, lists: Any, output: str = "out", **settings: Any) -> tuple[Path, Any]:
    config = TrainingConfig(
        output=str(directory / output),
        precision="fp32",
        batch_size=4,
        learning_rate=1e-3,
        eval_steps=2,
        logging_steps=1,
        show_progress_bar=False,
        **settings,
    )
    base = directory / "tiny-base"
    if not base.exists():
        make_tiny_bert(base)
    return directory / output, Trainer(
        str(base), lists, eval=make_lists(10, seed=1), config=config
    ).train()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("card")
    rows = "".join(json.dumps(row) + "\n" for row in make_lists(20))
    (directory / "my-lists.jsonl").write_text(rows)
    return train(directory, str(directory / "my-lists.jsonl"))


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    marks, _, _ = title.partition(" ")
    return re.split(rf"\n#{{1,{len(marks)}}} ", text.split(f"\n{title}\n", 1)[1])[0]


def cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in rows
        if not line.startswith("| :-")
    ]


def test_the_metadata_is_the_hubs(run: tuple[Path, Any]):
    output, result = run
    text = (output / "README.md").read_text(encoding="utf-8")
    validate_card(text)
    data = ModelCard(text).data
    assert data.tags == ["sentence-transformers", "cross-encoder", "reranker",
    "generated_from_trainer",
                         "dataset_size:20", "loss:LambdaLoss"]  # fmt: skip
    assert (data.pipeline_tag, data.library_name) == ("text-ranking", "sentence-transformers")
    assert data.base_model is None  # a directory is nothing that the hub could link to
    assert {one.metric_type: one.metric_value for one in data.eval_results} == {
        name: result.metrics[name] for name in ("map", "mrr@10", "ndcg@10")
    }


def test_the_code_runs_as_printed(
    run: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    output, _ = run
    monkeypatch.chdir(output.parent)
    snippets = re.findall(
        r"```python\n(.*?)```", (output / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert [snippet.split()[1] for snippet in snippets] == ["rerank_fast", "sentence_transformers"]
    scores = []
    for snippet in snippets:
        names: dict[str, Any] = {}
        exec(snippet, names)
        expected = re.search(r"print\(scores.shape\)\n# (.*)", snippet)
        assert expected is not None
        assert capsys.readouterr().out.strip() == expected[1]
        assert [entry["corpus_id"] for entry in names["ranking"]] == names["scores"].argsort()[
            ::-1
        ].tolist()
        scores.append(names["scores"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_its_tables_are_the_runs_figures(run: tuple[Path, Any]):
    output, result = run
    text = (output / "README.md").read_text(encoding="utf-8")
    metrics = result.metrics
    table = cells(section(text, "### Cross Encoder Reranking"))
    assert table[1:] == [
        [f"`{name}`", f"{metrics[name]:.4f} ({metrics[name] - metrics[f'base_{name}']:+.4f})"]
        for name in ("map", "mrr@10", "ndcg@10")
    ]
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    head, before, *rows, saved = cells(section(text, "### Training log"))
    assert head == [
        "Epoch",
        "Step",
        "Training loss",
        "Validation loss",
        "Learning rate",
        "`ndcg@10`",
    ]
    steps = sorted({row["step"] for row in log})
    assert steps[0] == 0
    assert [row[1].strip("*") for row in rows] == [str(step) for step in steps[1:]]
    bold = [row for row in rows if row[1].startswith("**")]
    assert [row[1] for row in bold] == [f"**{result.best_step}**"]
    gain = f"{metrics['ndcg@10']:.4f} ({metrics['ndcg@10'] - metrics['base_ndcg@10']:+.4f})"
    assert bold[0][5] == f"**{gain}**"
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    assert [row[2].strip("*") for row in rows] == [f"{losses[step]:.4f}" for step in sorted(losses)]
    # The untrained model, and at the end the one that was saved.
    untrained = log[0]
    assert untrained["step"] == 0
    first = f"{untrained['ndcg@10']:.4f} ({untrained['ndcg@10'] - untrained['base_ndcg@10']:+.4f})"
    assert before == ["-1", "-1", "-", f"{untrained['eval_loss']:.4f}", "-", first]
    assert saved == ["-1", "-1", "-", f"{metrics['eval_loss']:.4f}", "-", gain]
    assert saved[3] == bold[0][3].strip("*")


# What sentence-transformers' template of a card has, and what stands for it here.
PARTS = {
    "Model Details": "## Model details",
    "Model Description": "- **Architecture:** ",
    "Model Type": "- **Model type:** cross-encoder",
    "Base model": "- **Base model:** ",
    "Maximum Sequence Length": "- **Maximum length:** ",
    "Number of Output Labels": "- **Output labels:** 1",
    "Supported Modalit": "- **Modality:** text",
    "Training Dataset": "### Training data",
    "Language": "- **Language:** ",
    "License": "- **License:** ",
    "Model Sources": "### Model sources",
    "Documentation": "- **Documentation:** ",
    "Repository": "- **Repository:** ",
    "Hugging Face": "- **Hugging Face:** ",
    "Full Model Architecture": "### Full model architecture\n\n```\nBertForSequenceClassification(",
    "Usage": "## Usage",
    "Direct Usage": "from sentence_transformers import CrossEncoder",
    "Evaluation": "## Evaluation",
    "Metrics": "| Metric |",
    "Training Details": "## Training details",
    "Training Hyperparameters": "### Hyperparameters",
    "Non-Default Hyperparameters": "#### Other than the defaults",
    "All Hyperparameters": "#### All",
    "Training Logs": "### Training log",
    "Environmental Impact": "### Environment",
    "Energy Consumed": "- **Energy:** ",
    "Carbon Emitted": "- **Carbon:** ",
    "Training Hardware": "### Environment",
    "On Cloud": "- **On cloud:** ",
    "GPU Model": "- **GPU:** ",
    "CPU Model": "- **CPU:** ",
    "RAM Size": "- **RAM:** ",
    "Training Time": "- **Training time:** ",
    "Training": "- **Training time:** ",
    "Total": "- **Total time:** ",
    "Framework Versions": "### Framework versions",
    "Citation": "## Citation",
    "BibTeX": "```bibtex",
}
LEFT_OUT = {"Additional Resources"}  # links to their blog
# Of the metadata, and of what the published run's card says under its headings.
METADATA = (
    "tags",
    "base_model",
    "pipeline_tag",
    "library_name",
    "metrics",
    "co2_eq_emissions",
    "model-index",
)
SAID = (
    "generated_from_trainer", "dataset_size:", "loss:LambdaLoss", "`eval_steps`: ",
    "`learning_rate`: ",
    "`warmup_ratio`: 0.1", "`warmup_steps`: None", "`seed`: 12", "`load_best`: True",
    "`optimizer`: `adamw`",
    "`adam_beta1`: 0.9", "`adam_beta2`: 0.999", "`adam_epsilon`: 1e-08",
    "`schedule`: `linear`",
    '"activation_fn": ',
    '"mini_batch_size": ', '"k": null', '"sigma": 1.0', "| -1 | -1 | - | ", "| Validation loss |",
    "Python: ",
    "Transformers: ", "PyTorch: ", "Accelerate: ", "Datasets: ", "Tokenizers: ",
    "wang2018lambdaloss",
    "reimers-2019-sentence-bert",
)  # fmt: skip


def test_it_has_all_that_the_published_card_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    template = (
        Path(sentence_transformers.__file__).parent / "cross_encoder" / "model_card_template.md"
    )
    text = template.read_text(encoding="utf-8").split("\n---\n", 1)[1]  # without the metadata
    theirs = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    keys = re.findall(
        r"^ *#+ ([A-Za-z][\w -]*\w)|^ *- \*\*([A-Za-z][\w -]*\w)", theirs, flags=re.MULTILINE
    )
    expected = {heading or key for heading, key in keys} - LEFT_OUT
    assert len(expected) > 25
    assert expected <= PARTS.keys()
    monkeypatch.setattr(
        EnergyMeter, "stop", lambda self: Energy(0.25, 0.014, "France", "A CPU", 23.5, False)
    )
    cached = tmp_path / "models--microsoft--some-encoder" / "snapshots" / "0123"
    make_tiny_bert(cached)
    evaluator = NanoBEIREvaluator(["msmarco", "nq"], make_nano_beir(tmp_path / "nano"))
    config = TrainingConfig(
        output=str(tmp_path / "out"), precision="fp32", max_steps=2, show_progress_bar=False,
        metric_for_best="NanoBEIR_R100_mean_ndcg@10",
    )  # fmt: skip
    result = Trainer(
        str(cached), make_lists(9), eval=make_lists(4, seed=1), evaluator=evaluator, config=config
    ).train()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert [part for part in PARTS.values() if part not in text] == []
    assert [part for part in SAID if part not in text] == []
    card = ModelCard(text)
    assert [key for key in METADATA if key not in card.data.to_dict()] == []
    assert card.data.metrics == ["map", "mrr@10", "ndcg@10"]
    assert card.data.base_model == "microsoft/some-encoder"
    results = {(one.dataset_name, one.metric_type): one for one in card.data.eval_results}
    mean = results["NanoBEIR R100 mean", "ndcg@10"]
    assert (mean.task_type, mean.task_name, mean.dataset_type) == (
        "cross-encoder-nano-beir", "Cross Encoder Nano BEIR", "NanoBEIR_R100_mean",
    )  # fmt: skip
    assert mean.metric_value == result.metrics["NanoBEIR_R100_mean_ndcg@10"]
    assert ("NanoMSMARCO R100", "map") in results
    block = section(text, "### Cross Encoder Nano BEIR")
    assert json.loads(block.split("```json")[1].split("```")[0]) == {
        "dataset_names": ["msmarco", "nq"], "rerank_k": 100, "at_k": 10,
        "always_rerank_positives": True,
    }  # fmt: skip
    assert "evaluated with `NanoBEIREvaluator`" in block


def test_a_run_that_ended_early_says_so(tmp_path: Path):
    def stop(event: Any) -> None:
        if event.name == "step_end" and event.step == 2:
            event.trainer.stop()

    make_tiny_bert(tmp_path / "base")
    config = TrainingConfig(
        output=str(tmp_path / "out"), precision="fp32", batch_size=2, show_progress_bar=False
    )
    Trainer(str(tmp_path / "base"), make_lists(20), config=config, callbacks=[stop]).train()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- **Steps:** 2 of 10, ended early" in text
    assert "- **Processes:** 1" in text
    assert re.search(r"`max_tokens_per_microbatch`: \d+", section(text, "#### All"))
    assert "An unnamed dataset." in section(text, "### Training data")


def test_data_settings_and_environment(run: tuple[Path, Any]):
    output, _ = run
    text = (output / "README.md").read_text(encoding="utf-8")
    data = section(text, "### Training data")
    assert "`my-lists.jsonl`" in data
    assert "* Size: 20 training lists" in data
    lists = make_lists(20)
    sizes = [len(docs) for docs in lists["docs"]]
    lengths = [len(doc) for docs in lists["docs"] for doc in docs]
    table = {row[0]: row[2] for row in cells(data)[1:]}
    assert table["query"] == "min 17, mean 17.0, max 17 characters"
    assert table["docs"] == (
        f"min {min(sizes)}, mean {sum(sizes) / len(sizes):.1f}, max {max(sizes)} documents<br>"
        f"min {min(lengths)}, mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)} "
        "characters each"
    )
    labels = [label for values in lists["labels"] for label in values]
    share = sum(labels) / len(labels)
    assert table["labels"] == f"0: {1 - share:.1%}, 1: {share:.1%}"
    assert data.count("<tr>") == 1 + 3  # a head and three samples
    loss = json.loads(section(text, "### Loss").split("```json")[1].split("```")[0])
    assert loss == {"scheme": "ndcg2pp", "k": None, "sigma": 1.0, "mu": 10.0, "eps": 1e-10,
                    "reduction_log": "binary", "reduction": "pairs", "mini_batch_size": None,
                    "activation_fn": "torch.nn.modules.linear.Identity"}  # fmt: skip
    changed = section(text, "#### Other than the defaults")
    assert set(re.findall(r"- `(\w+)`", changed)) == {
        "batch_size", "learning_rate", "precision", "eval_steps", "logging_steps"
    }  # fmt: skip
    assert "- `weight_decay`: 0.0" in section(text, "#### All")
    assert "Scores were computed in float32." in section(text, "## Evaluation")
    assert "- **Training time:** " in text
    assert "wang2018lambdaloss" in text
    assert str(output.parent) not in text  # whose machine it was is nobody's business
    if "training.png" in text:
        assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_sources_of_streams_and_of_open_datasets_are_named(tmp_path: Path):
    file = tmp_path / "streamed-lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_lists(9)))
    output, _ = train(tmp_path, ListStream(str(file)), "stream", max_steps=1)
    data = section((output / "README.md").read_text(encoding="utf-8"), "### Training data")
    assert "`streamed-lists.jsonl`" in data
    assert "* Size: a stream" in data

    url = "hf://datasets/someone/some-lists@0123abc/data/train.parquet"
    from_hub = DatasetInfo(download_checksums={url: {"num_bytes": 1, "checksum": None}})
    lists = make_lists(9)
    assert names_of(Dataset(lists.data, info=from_hub)) == ["someone/some-lists"]
    stream = lists.to_iterable_dataset()
    stream.info.update(DatasetInfo(builder_name="parquet", dataset_name="some-lists"))
    output, _ = train(tmp_path, stream, "iterable", max_steps=1)
    assert "`some-lists`" in section(
        (output / "README.md").read_text(encoding="utf-8"), "### Training data"
    )
    assert (
        names_of(Dataset(lists.data, info=DatasetInfo(builder_name="json", dataset_name="json")))
        == []
    )
    assert names_of([str(file), file]) == [str(file)] * 2
    assert names_of(list(lists)) == []


class Skeleton(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", data))

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(text: str) -> Skeleton:
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    body = text.split("\n---\n", 1)[1]
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Skeleton(parser.render(body))


def test_hostile_text_changes_no_tag_of_the_page(tmp_path: Path):
    harmless = [
        {
            "query": f"harmless {i}",
            "docs": [f"document {i} {j}" for j in range(3)],
            "labels": [1, 0, 0],
        }
        for i in range(len(HOSTILE))
    ]
    hostile = [
        {
            "query": HOSTILE[i],
            "docs": [HOSTILE[(i + j) % len(HOSTILE)] for j in range(3)],
            "labels": [1, 0, 0],
        }
        for i in range(len(HOSTILE))
    ]
    texts = []
    for name, lists in (("good", harmless), ("evil", hostile)):
        output, _ = train(tmp_path, lists, name, max_steps=2)
        card = (output / "README.md").read_text(encoding="utf-8")
        evaluator = RerankingEvaluator(
            lists, name="a|b</td> `x` <b>" if name == "evil" else "plain"
        )
        texts.append(
            (card, "\n\n".join(model_card._data(model_card.describe_lists(lists), [], [evaluator])))
        )
    for good, evil in zip(*texts, strict=True):
        expected, found = rendered(f"\n---\n{good}"), rendered(f"\n---\n{evil}")
        assert found.tags == expected.tags
    page = rendered(texts[1][0])
    assert clean(HOSTILE[0]) in page.text
    assert clean(HOSTILE[2], 200) in page.text
    assert not any(tag[0] in ("script", "a") and "evil" in str(tag) for tag in page.tags)
    assert (
        ModelCard(texts[1][0]).data.to_dict().keys() == ModelCard(texts[0][0]).data.to_dict().keys()
    )
    # The code with the hostile query in it is still that code.
    for snippet in re.findall(r"```python\n(.*?)\n```", texts[1][0], re.DOTALL):
        names = {}
        exec(
            "\n".join(
                line
                for line in snippet.splitlines()
                if not re.match("from|model|scores|rank|print", line)
            ),
            names,
        )
        assert names["query"] == clean(HOSTILE[0], 160)


def test_a_markdown_table_holds_a_hostile_name(tmp_path: Path):
    name = "a|b</td> `x` [l](http://e) <b>"
    evaluator = RerankingEvaluator(make_lists(3), name=name)
    metrics = {evaluator.set.prefixed(metric): 0.5 for metric in evaluator.set.metrics}
    page = rendered(
        "\n---\n" + "\n\n".join(card_results.evaluation_sections([evaluator], metrics, "float32"))
    )
    assert page.tags.count("/td") == 3 * 2
    assert not {"a", "b", "img"} & {tag[0] for tag in page.tags}
    assert name in page.text


def test_a_card_is_of_the_weights_that_it_is_saved_with(run: tuple[Path, Any], tmp_path: Path):
    """Also where another loop than the Trainer has trained the model since."""
    output, _ = run
    model = CrossEncoder(output, device="cpu")
    model.to(torch.bfloat16).to(torch.float32).eval()
    model.predict([("what is the panda", "bear")])
    model.save_pretrained(tmp_path / "same")
    assert "### Training log" in (tmp_path / "same" / "README.md").read_text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(model.preprocess([("what is the panda", "bear")]))["scores"].sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "other")
    text = (tmp_path / "other" / "README.md").read_text()
    assert "### Training log" not in text
    assert "## Evaluation" not in text


@pytest.mark.parametrize("load_best", [True, False])
def test_the_model_in_memory_has_the_card_of_its_run(load_best: bool, tmp_path: Path):
    make_tiny_bert(tmp_path / "base")
    model = CrossEncoder(tmp_path / "base", device="cpu")
    config = TrainingConfig(
        output=str(tmp_path / "out"), precision="fp32", max_steps=2, ema_decay=0.5,
        load_best=load_best, show_progress_bar=False,
    )  # fmt: skip
    Trainer(model, make_lists(9), config=config).train()
    model.save_pretrained(tmp_path / "copy")
    saved, copied = ((tmp_path / name / "README.md").read_text() for name in ("out", "copy"))
    assert (copied == saved.replace('CrossEncoder("out")', 'CrossEncoder("copy")')) == load_best


def test_long_texts_are_cut_and_characters_without_a_glyph_removed():
    assert clean("a\n b\t\x00c") == "a b c"
    assert clean("x" * 300, 200) == "x" * 199 + "…"
    assert clean("‮abc‬") == "abc"
    assert escape("<b>|`") == "&#60;b&#62;&#124;&#96;"
    assert escape("日本語 naïve 👍") == "日本語 naïve 👍"


def test_energy_is_shown_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        EnergyMeter, "stop", lambda self: Energy(0.25, 0.014, "France", "A CPU", 23.5, True)
    )
    output, _ = train(tmp_path, make_lists(4), max_steps=1)
    text = (output / "README.md").read_text(encoding="utf-8")
    assert "- **Energy:** 0.25 kWh" in text
    assert "- **On cloud:** yes" in text
    assert "- **Carbon:** 0.014 kg of CO2-equivalent, on the grid of France" in text
    emissions = ModelCard(text).data.co2_eq_emissions
    assert (emissions["emissions"], emissions["energy_consumed"], emissions["source"]) == (
        14.0,
        0.25,
        "codecarbon",
    )
    monkeypatch.setattr(EnergyMeter, "stop", lambda self: None)
    output, _ = train(tmp_path, make_lists(4), "again", max_steps=1)
    text = (output / "README.md").read_text(encoding="utf-8")
    assert "not measured; codecarbon is not installed" in text


def test_codecarbon_measures_without_the_network(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("codecarbon", reason="the card extra is not installed")
    asked = []

    def connect(_: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "FRA")

    def work() -> None:
        """Longer than the 50 ms after which codecarbon reads its meters again."""
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            pass

    meter = EnergyMeter()
    meter.start()
    work()
    first = meter.so_far()
    work()
    energy = meter.stop()
    assert first is not None
    assert energy is not None
    assert energy.kwh > first.kwh > 0
    meter.start(energy)
    work()
    both = meter.stop()
    assert both is not None
    assert (both.kwh, both.kg_co2) > (energy.kwh, energy.kg_co2)
    assert energy.country == "France"
    assert not asked
    assert EnergyMeter().stop() is None  # never started


def test_a_card_stays_with_its_model_until_that_is_trained(run: tuple[Path, Any], tmp_path: Path):
    output, _ = run
    model = CrossEncoder(output, device="cpu")
    model.save_pretrained(tmp_path / "copy")
    text, copied = ((path / "README.md").read_text() for path in (output, tmp_path / "copy"))
    assert copied == text.replace('CrossEncoder("out")', 'CrossEncoder("copy")')
    if "training.png" in text:
        assert (tmp_path / "copy" / "training.png").read_bytes() == (
            output / "training.png"
        ).read_bytes()
    model.card_metadata["license"] = "mit"
    model.save_pretrained(tmp_path / "licensed")
    licensed = ModelCard.load(tmp_path / "licensed" / "README.md")
    assert licensed.data.license == "mit"
    assert licensed.text == ModelCard(copied).text.replace(
        'CrossEncoder("copy")', 'CrossEncoder("licensed")'
    )

    (tmp_path / "copy" / "README.md").write_text(
        "---\nlicense: cc-by-4.0\nlanguage: [de]\n---\n\nOld figures.\n"
    )
    config = TrainingConfig(
        output=str(tmp_path / "new"), precision="fp32", max_steps=1, show_progress_bar=False
    )
    Trainer(str(tmp_path / "copy"), make_lists(4), config=config).train()
    new = ModelCard.load(tmp_path / "new" / "README.md")
    assert "Old figures" not in new.text
    # Those of what it is made from.
    assert (new.data.license, new.data.language) == (
        "cc-by-4.0",
        ["de"],
    )
    assert "- **License:** cc-by-4.0" in new.text
    assert "- **Language:** de" in new.text


def test_a_card_with_broken_front_matter_keeps_no_model_from_being_saved(tmp_path: Path):
    bert = make_tiny_bert(tmp_path / "bert")
    (bert / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n", encoding="utf-8")
    CrossEncoder(bert, device="cpu").save_pretrained(tmp_path / "copy")
    assert "# Mine" in (tmp_path / "copy" / "README.md").read_text()


def test_the_short_card_of_a_model_nobody_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bert = make_tiny_bert(tmp_path / "bert")
    CrossEncoder(bert, device="cpu").save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    validate_card(text)
    assert ModelCard(text).data.tags == ["sentence-transformers", "cross-encoder", "reranker"]
    monkeypatch.chdir(tmp_path)
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:1]:
        exec(snippet, {})
    # An encoder's own card is not that of the reranker made from it.
    encoder = make_tiny_bert(tmp_path / "encoder", head=False)
    (encoder / "README.md").write_text("---\nlicense: mit\n---\nAn encoder for masked words.\n")
    CrossEncoder(encoder, device="cpu").save_pretrained(tmp_path / "fresh")
    fresh = ModelCard.load(tmp_path / "fresh" / "README.md")
    assert fresh.data.license == "mit"
    assert "masked words" not in fresh.text
    # Front matter that is no mapping is not a reason to fail.
    (encoder / "README.md").write_text("---\n- just\n- a list\n---\n")
    CrossEncoder(encoder, device="cpu").save_pretrained(tmp_path / "odd")
    # A README that stands where no model is belongs to somebody.
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("My project\n")
    with pytest.raises(ValueError, match=r"already holds a model or a README\.md"):
        CrossEncoder(bert, device="cpu").save_pretrained(tmp_path / "project")
    assert (tmp_path / "project" / "README.md").read_text() == "My project\n"


def test_hub_ids_and_what_is_none(tmp_path: Path):
    assert hub_id("microsoft/MiniLM-L12-H384-uncased") == "microsoft/MiniLM-L12-H384-uncased"
    cached = tmp_path / "hub" / "models--BAAI--bge-reranker-base" / "snapshots" / "abc123"
    cached.mkdir(parents=True)
    assert hub_id(str(cached)) == "BAAI/bge-reranker-base"
    assert hub_id(str(tmp_path)) is None
    assert hub_id("no/such/model") is None


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("", "has no metadata"),
        ("base_model: a b", "base_model in the model card's metadata"),
        ("datasets: [ok/data, 'no/such/thing']", "datasets in the model card's metadata"),
        ("model-index: [{name: x}]", "model_index"),
        ("- a list", "should be a dict"),
    ],
)
def test_wrong_metadata_is_refused(front_matter: str, message: str):
    with pytest.raises(ValueError, match=message):
        validate_card(f"---\n{front_matter}\n---\ntext\n")


def test_with_metadata_keeps_the_text():
    card = Card('---\nlicense: mit\n---\n\n# Mine\n\nCrossEncoder("a")\n', "a")
    assert card.with_metadata({"license": "mit"}) is card
    changed = card.with_metadata({"license": "apache-2.0", "language": "en"}).named("me/b")
    assert ModelCard(changed.text).data.to_dict() == {"license": "apache-2.0", "language": "en"}
    assert changed.text.endswith('# Mine\n\nCrossEncoder("me/b")\n')
