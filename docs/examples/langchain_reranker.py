"""A reranker behind a LangChain retriever: pip install langchain-classic"""

import os

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from rerank_fast.model.protocols.langchain import LangChainCrossEncoder

texts = ["The sea is wet.", "A panda eats bamboo all day.", "Paris is the capital of France."]
first_stage = RunnableLambda(lambda query: [Document(text) for text in texts])  # your retriever

reranker = CrossEncoderReranker(model=LangChainCrossEncoder(os.environ["RERANKER"]), top_n=2)
retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=first_stage)
for document in retriever.invoke("what do pandas eat"):
    print(document.page_content)
