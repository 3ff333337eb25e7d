"""Where the subject stands in a prompt of a data set that does not say it."""

import re
from typing import Any

from ...kernels.errors import InputError


def mark_subject(prompt: Any, subject: Any) -> tuple[Any, Any]:
    """(`prompt` with `{}` at the subject, the subject as it stands there); both as they are where neither is text.

    Of several places the last one at which the subject is a word of its own is taken ("i" is none in "with"), or the
    last one where it is none anywhere: there the model has read most of what is asked. A subject in other letters
    (capitals, small ones) is marked where there is exactly one such place, and then is what stands there.

    Raises `InputError` where there is no such place, several in other letters, or the prompt holds `{}` itself.
    """
    if not (isinstance(prompt, str) and isinstance(subject, str) and prompt.strip() and subject.strip()):
        return prompt, subject  # `Fact` says what is wrong with it
    if "{}" in prompt:
        raise InputError(f"prompt {prompt!r} holds {{}} itself, which would mark the subject's place; reword it")
    exact = places(prompt, subject)
    other = [] if exact else [match.span() for match in re.finditer(re.escape(subject), prompt, re.IGNORECASE)]
    if len(other) > 1:
        raise InputError(f"subject {subject!r} occurs {len(other)} times in prompt {prompt!r}, in other letters")
    if not exact and not other:
        raise InputError(f"subject {subject!r} does not occur in prompt {prompt!r}")
    whole = [span for span in exact if stands_alone(prompt, *span)]
    start, end = (whole or exact or other)[-1]
    return f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end]


def places(prompt: str, subject: str) -> list[tuple[int, int]]:
    """(start, end) of each occurrence, in the same letters."""
    return [match.span() for match in re.finditer(re.escape(subject), prompt)]


def stands_alone(prompt: str, start: int, end: int) -> bool:
    """Whether what stands at [start, end) is no part of a longer word or number."""
    within = prompt[start:end]
    cut_before = start > 0 and prompt[start - 1].isalnum() and within[0].isalnum()
    cut_behind = end < len(prompt) and prompt[end].isalnum() and within[-1].isalnum()
    return not (cut_before or cut_behind)
