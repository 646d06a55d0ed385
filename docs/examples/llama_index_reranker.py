"""A reranker as a LlamaIndex node postprocessor: pip install llama-index-core"""

import os

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from pydantic import PrivateAttr

from rerank_fast import CrossEncoder


class RerankFast(BaseNodePostprocessor):
    model: str
    top_n: int = 5
    _reranker: CrossEncoder = PrivateAttr()

    def model_post_init(self, context) -> None:
        self._reranker = CrossEncoder(self.model)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("expected a query to rerank by, got none")
        texts = [one.node.get_content(metadata_mode=MetadataMode.EMBED) for one in nodes]
        ranking = self._reranker.rank(query_bundle.query_str, texts, top_k=self.top_n)
        return [
            NodeWithScore(node=nodes[hit["corpus_id"]].node, score=hit["score"]) for hit in ranking
        ]


# In an index: index.as_query_engine(node_postprocessors=[RerankFast(model="my-reranker")])
texts = ["The sea is wet.", "A panda eats bamboo all day.", "Paris is the capital of France."]
nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
reranker = RerankFast(model=os.environ["RERANKER"], top_n=2)
for hit in reranker.postprocess_nodes(nodes, query_str="what do pandas eat"):
    print(f"{hit.score:.4f} {hit.text}")
