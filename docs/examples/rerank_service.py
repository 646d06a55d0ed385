"""POST /rerank in Cohere's schema: RERANKER=my-reranker uvicorn rerank_service:app"""

import asyncio
import os
import uuid
from typing import Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from torch import nn

from rerank_fast import CrossEncoder

NAME = os.environ["RERANKER"]
app, model = FastAPI(), CrossEncoder(NAME, activation_fn=nn.Sigmoid())
waiting, at_work = [], asyncio.Lock()


class Document(BaseModel):
    text: str


class RerankRequest(BaseModel):
    model: Literal[NAME] = NAME
    query: str = Field(min_length=1)
    documents: list[str | Document] = Field(min_length=1, max_length=1000)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


async def rank(query: str, documents: list[str]) -> list[dict]:
    """What comes in while the model is at work is ranked together, in its next call."""
    answer = asyncio.Future()
    waiting.append((query, documents, answer))
    async with at_work:  # in the order in which they came
        if not answer.done():
            queries, lists, answers = zip(*waiting[:32], strict=True)
            del waiting[:32]
            try:
                ranked = await asyncio.to_thread(model.rank_many, queries, lists)
                for one, hits in zip(answers, ranked, strict=True):
                    one.set_result(hits)
            except Exception as error:
                for one in answers:
                    one.set_exception(error)
    return await answer


@app.exception_handler(RequestValidationError)
async def refuse(_, error: RequestValidationError) -> JSONResponse:
    said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return JSONResponse({"message": f"invalid request: {said}"}, status_code=422)


@app.post("/rerank")
@app.post("/v1/rerank")
@app.post("/v2/rerank")
async def rerank(request: RerankRequest):
    texts = [one if isinstance(one, str) else one.text for one in request.documents]
    results = []
    for hit in (await rank(request.query, texts))[: request.top_n]:
        results.append({"index": hit["corpus_id"], "relevance_score": hit["score"]})
        if request.return_documents:
            results[-1]["document"] = {"text": texts[hit["corpus_id"]]}
    return {"id": str(uuid.uuid4()), "results": results, "meta": {"api_version": {"version": "2"}}}
