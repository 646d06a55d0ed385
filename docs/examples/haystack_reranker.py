"""A reranker as a Haystack component in a pipeline: pip install haystack-ai"""

import os
from dataclasses import replace

from haystack import Document, Pipeline, component

from rerank_fast import CrossEncoder


@component
class RerankFast:
    def __init__(self, model: str, top_k: int = 10) -> None:
        self.model, self.top_k = model, top_k  # what a saved pipeline is made of again
        self.reranker: CrossEncoder | None = None

    def warm_up(self) -> None:  # a pipeline calls it before it runs
        if self.reranker is None:
            self.reranker = CrossEncoder(self.model)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict:
        self.warm_up()
        texts = [one.content or "" for one in documents]
        ranking = self.reranker.rank(query, texts, top_k=top_k or self.top_k)
        return {
            "documents": [
                replace(documents[hit["corpus_id"]], score=hit["score"]) for hit in ranking
            ]
        }


texts = ["The sea is wet.", "A panda eats bamboo all day.", "Paris is the capital of France."]
pipeline = Pipeline()  # with a retriever before it: pipeline.connect("retriever", "reranker")
pipeline.add_component("reranker", RerankFast(os.environ["RERANKER"], top_k=2))
found = {"query": "what do pandas eat", "documents": [Document(content=text) for text in texts]}
for document in pipeline.run({"reranker": found})["reranker"]["documents"]:
    print(f"{document.score:.4f} {document.content}")
