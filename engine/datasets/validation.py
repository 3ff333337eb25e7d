"""All that a user would want to know of a file of facts before hours go into it."""

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..facts import Fact, InvalidFact
from .marking import places, stands_alone
from .reading import Reader, again

Severity = Literal["error", "warning", "missing"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "missing")

MISSING = {  # field of a fact -> what cannot be measured without it
    "target_true": "success (the new object more probable than the true one) cannot be scored",
    "paraphrases": "whether the edit holds in other words cannot be measured",
    "neighbors": "whether neighbours keep their object cannot be measured",
    "locality": "whether other questions keep their answers cannot be measured",
}
_MOJIBAKE = re.compile("[ÃÂ][\x80-\xbf]|â€|\ufffd")  # UTF-8 read as Latin-1 or CP1252; the replacement character
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one record.

    severity: "error": it cannot be edited, or no file with it is read; "warning": it can, but look at it;
        "missing": it can, but something cannot be measured
    kind: what sort of problem, the same text wherever it occurs; where: "record 5", "line 3"; text: the case at hand
    """

    severity: Severity
    kind: str
    where: str
    text: str


@dataclass(frozen=True)
class Group:
    """The problems of a kind: how many records have it, and the first ones."""

    severity: Severity
    kind: str
    count: int
    examples: tuple[Problem, ...]


@dataclass(frozen=True)
class Report:
    """What `validate` found: `records` in the file, `facts` of them that can be edited, and every problem, in order."""

    path: str
    records: int
    facts: int
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> int:
        """Records with an error."""
        return self._places("error")

    @property
    def clean(self) -> int:
        """Records with neither an error nor a warning; something may be missing."""
        return self.records - self._places("error", "warning")

    def groups(self, examples: int = 3) -> list[Group]:
        """By severity and kind, errors first; each with its first `examples` problems."""
        found: dict[tuple[Severity, str], list[Problem]] = {}
        for problem in self.problems:
            found.setdefault((problem.severity, problem.kind), []).append(problem)
        ordered = sorted(found.items(), key=lambda item: SEVERITIES.index(item[0][0]))
        return [
            Group(severity, kind, len({problem.where for problem in problems}), tuple(problems[:examples]))
            for (severity, kind), problems in ordered
        ]

    def _places(self, *severities: Severity) -> int:
        return len({problem.where for problem in self.problems if problem.severity in severities})


def validate(path: str | Path, convention: str | None = None) -> Report:
    """Looks at every record of a file of facts, as `read_facts` takes it, and at each against the others.

    Raises `InputError` as `scan_facts` does, where the file itself is wrong and nothing could be said of its records.
    """
    problems: list[Problem] = []
    ids: dict[str, str] = {}
    asked: dict[str, tuple[str, Fact]] = {}
    records = facts = 0
    for where, named, found in Reader(Path(path), convention):
        records += 1
        if isinstance(found, InvalidFact):
            problems.append(Problem("error", "cannot be edited", where, found.reason))
            continue
        facts += 1
        if found.id in ids:
            text = f"{again(named, found)}, as in {ids[found.id]}"
            problems.append(Problem("error", "the same fact or id twice: the file is refused", where, text))
        ids.setdefault(found.id, where)
        problems += [Problem("warning", kind, where, text) for kind, text in _of_one(named, found)]
        problems += [Problem("warning", kind, where, text) for kind, text in _of_two(found, asked)]
        asked.setdefault(_plain(found.question), (where, found))
        problems += [
            Problem("missing", f"no {name}: {what}", where, f"fact {found.id}")
            for name, what in MISSING.items()
            if not getattr(found, name)
        ]
    return Report(str(path), records, facts, tuple(problems))


_Found = Iterator[tuple[str, str]]  # (kind, text)


def _of_one(named: Mapping[str, Any], fact: Fact) -> _Found:
    """Warnings about a fact alone; `named` are its fields as the file has them."""
    yield from _of_subject(fact)
    yield from _of_targets(named, fact)
    yield from _of_prompts(fact)
    for text in _texts(fact):
        if _MOJIBAKE.search(text):
            yield "characters that were lost in decoding", repr(_short(text))
            break


def _of_subject(fact: Fact) -> _Found:
    start = fact.prompt.index("{}")
    found = places(fact.question, fact.subject)
    if len(found) > 1:
        taken = [begin for begin, _ in found].index(start) + 1 if (start, start + len(fact.subject)) in found else None
        which = f"number {taken} of {len(found)} is taken" if taken else f"{len(found)} occurrences beside the mark's"
        yield "subject more than once in its prompt", f"{fact.subject!r} in {_short(fact.question)!r}: {which}"
    if not stands_alone(fact.question, start, start + len(fact.subject)):
        yield "subject is part of a longer word", f"{fact.subject!r} in {_short(fact.question)!r}"


def _of_targets(named: Mapping[str, Any], fact: Fact) -> _Found:
    for name in ("target_new", "target_true"):
        text = named.get(name)
        if isinstance(text, str) and text != text.strip():
            yield "spaces around the object", f"{name} {text!r}: they are taken off"
    if fact.target_true is not None and _plain(fact.target_new) == _plain(fact.target_true):
        yield "the new object is the true one", repr(fact.target_new)
    if not normalized(fact.target_new):
        yield "new object of which normalising leaves nothing", f"{fact.target_new!r}: no answer can match it"
        return
    said = re.split(r"[.\n]", fact.target_new, maxsplit=1)[0]
    if normalized(said) != normalized(fact.target_new):
        text = f"{_short(fact.target_new)!r} stops behind {said[-40:]!r}"
        yield "new object that generation stops within ('.' or a new line)", text


def _of_prompts(fact: Fact) -> _Found:
    held_out = [*fact.neighbors, *(probe.prompt for probe in fact.locality)]
    question = _plain(fact.question)
    if any(_plain(text) == question for text in fact.paraphrases):
        yield "paraphrase that is the prompt", repr(_short(fact.question))
    if any(_plain(text) == question for text in held_out):
        yield "held-out question that is the prompt", repr(_short(fact.question))
    elif inside := [text for text in held_out if _names(text, fact.subject)]:
        yield "held-out question with the subject in it", f"{fact.subject!r} in {_short(inside[0])!r}"
    told = {neighbor.question.strip() for neighbor in fact.edit_neighbors}
    if both := [text for text in fact.neighbors if text.strip() in told]:
        yield "edit-time neighbour among neighbors: not counted there", repr(_short(both[0]))
    prompts = [fact.question, *fact.paraphrases]
    for kind, texts in (("prompt", prompts), ("held-out question", held_out)):
        if ending := [text for text in texts if text != text.rstrip()]:
            yield f"{kind} that ends in a space", repr(ending[0][-40:])
    prompts += held_out
    if braced := [text for text in prompts if "{" in text or "}" in text]:
        yield "prompt with braces", repr(_short(braced[0]))
    if quoted := [text for text in prompts if re.fullmatch(r'".*"".*"', text.strip(), re.DOTALL)]:
        yield 'prompt quoted as a CSV cell (""): taken as it is', repr(_short(quoted[0]))


def _of_two(fact: Fact, asked: Mapping[str, tuple[str, Fact]]) -> _Found:
    """Warnings about a fact and the first one before it with the same question."""
    if _plain(fact.question) not in asked:
        return
    where, other = asked[_plain(fact.question)]
    if _plain(fact.target_new) == _plain(other.target_new):
        yield "question asked twice, with the same object", f"{_short(fact.question)!r}, as in {where}"
    else:
        text = f"{_short(fact.question)!r}: {fact.target_new!r}, but {other.target_new!r} in {where}"
        yield "question asked twice, with another object", text


def normalized(text: str) -> str:
    """As answers are compared in WILD (arXiv 2502.11177): small letters, no ASCII punctuation, articles or spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def _texts(fact: Fact) -> list[str]:
    probes = [text for probe in fact.locality for text in (probe.prompt, probe.target)]
    return [fact.question, fact.target_new, fact.target_true or "", *fact.paraphrases, *fact.neighbors, *probes]


def _names(text: str, subject: str) -> bool:
    return any(stands_alone(text, *span) for span in places(text, subject))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
