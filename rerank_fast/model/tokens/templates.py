"""Prompts of published language-model rerankers, as chat templates with the roles that
sentence-transformers gives a pair: query, document, and system for an instruction.
"""

from __future__ import annotations


def _content(role: str, default: str = "") -> str:
    """What a template puts in for the message of a role."""
    of_role = f"messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first"
    return f'{{{{ {of_role} | default("{default}") }}}}' if default else f"{{{{ {of_role} }}}}"


QWEN3_RERANKER_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    "the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: "
    + _content(
        "system",
        "Given a web search query, retrieve relevant passages that answer the query",
    )
    + f"\n<Query>: {_content('query')}\n<Document>: {_content('document')}"
    # Jinja drops a newline at the end of a template.
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>{{ '\\n\\n' }}"
)

# monoT5 and mT5 of the same makers (Nogueira et al. 2020, "Document Ranking with a Pretrained
# Sequence-to-Sequence Model"). An instruction goes before all else.
MONO_T5_TEMPLATE = (
    "{% for message in messages if message.role == 'system' %}{{ message.content }} {% endfor %}"
    f"Query: {_content('query')} Document: {_content('document')} Relevant:{{{{ eos_token }}}}"
)

# BAAI/bge-reranker-v2-gemma, whose files hold none; the instruction is the question at the end. Its
# score is the logit of "Yes".
BGE_RERANKER_TEMPLATE = (
    f"{{{{ bos_token }}}}A: {_content('query')}\nB: {_content('document')}\n"
    + _content(
        "system",
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'.",
    )
)
