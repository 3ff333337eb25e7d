"""What stands around a question when a model is asked it (arXiv 2502.11177)."""

import difflib
from collections.abc import Callable
from typing import Any

from ...kernels.errors import InputError
from ..model import Model

QUESTION, INSTRUCTION = "question-only", "qa_inst"
_SYSTEM = "You are a helpful, respectful and honest assistant."


def _chat(model: Model, prompt: str) -> str:
    tokenizer: Any = model.tokenizer
    if not tokenizer.chat_template:
        raise InputError(f"context chat: the tokenizer of {model.name} has no chat template; use qa_inst or chat_temp")
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    begins = tokenizer("")["input_ids"]  # what the tokenizer puts in front by itself is not written twice
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token_id in begins else text


CONTEXTS: dict[str, Callable[[Model, str], str]] = {
    QUESTION: lambda model, prompt: prompt,
    INSTRUCTION: lambda model, prompt: f"Please answer the question:\n\nQ: {prompt}\nA:",
    # as published, for every model: Llama 2's format with its marks written out, and an end of text behind the prompt
    "chat_temp": lambda model, prompt: f"<s>[INST] <<SYS>>\n{_SYSTEM}\n<</SYS>>\n\n{prompt} [/INST]</s>",
    "chat": _chat,
}
ABOUT = {
    QUESTION: "the prompt as it is",
    INSTRUCTION: "an instruction to answer the question, and the prompt as one",
    "chat_temp": "the published chat text, Llama 2's for every model",
    "chat": "the tokenizer's own chat template",
}


def in_context(model: Model, prompt: str, context: str) -> str:
    """The text that the model is given. Raises `InputError` for an unknown context, and where a model has none."""
    check_context(context)
    return CONTEXTS[context](model, prompt)


def check_context(context: str) -> None:
    """Raises `InputError` for an unknown one."""
    if context not in CONTEXTS:
        near = difflib.get_close_matches(context, CONTEXTS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONTEXTS)}"
        raise InputError(f"unknown context {context!r}; {hint}")
