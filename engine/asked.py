"""A model as it is asked questions: as its weights are, or each fact under a delta of its own beside them.

Protocols ask nothing else, so all of them are batched, resumable, and measure hundreds of single edits at once.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from ..kernels.errors import InputError
from .answer_store import AnswerStore, Questions, question_key
from .beside import Beside
from .decoding import LIMIT, Said, continue_each
from .delta import Update
from .endings import ending
from .model import Model
from .phases import Tick
from .prompts import Row, answer_rows, prompt_ids
from .scores import Answer, token_scores

TOGETHER = 512  # deltas whose factors are on the device at once
NOBODY = -1  # the owner of what is asked of the weights as they are


@dataclass(frozen=True)
class Asked:
    """Who is asked.

    deltas: of each fact its own update, beside the weights; empty: all facts are asked of the weights as they are
    batch_tokens: padded tokens of a forward; batch_rows: rows of one, and continued at once; None: from the free memory
    store: where answers are looked for and put as they come
    """

    model: Model
    deltas: Sequence[Update] = ()
    batch_tokens: int | None = None
    batch_rows: int | None = None
    store: AnswerStore | None = None
    _digests: dict[int, str] = field(default_factory=dict, repr=False)

    def answers(
        self,
        asked: Sequence[tuple[int, str, str]],
        progress: Tick = lambda done, total: None,
        begins: Sequence[int] = (),
    ) -> list[Answer]:
        """Teacher-forced: for each (number of the fact, prompt, object) what is made of the object's tokens.

        begins: of each the position of its first token, where that is not 0
        What is asked twice runs once. Raises `InputError` for what is longer than the model's longest row.
        """
        firsts = list(begins) or [0] * len(asked)
        keyed = []
        for (number, prompt, target), first in zip(asked, firsts, strict=True):
            owner = self.owner(number)
            key = self._key("answer", owner, prompt, target, *([first] if first else []))
            keyed.append((key, (owner, prompt, target, first)))
        questions = Questions(self.store, keyed, _answer, _answer_written, progress)
        if not questions.left:
            return questions.replies()
        names, left = list(questions.left), list(questions.left.values())
        rows = answer_rows(self.model.tokenizer, [(prompt, target) for _, prompt, target, _ in left])
        for (_, prompt, _, _), row in zip(left, rows, strict=True):
            if len(row.ids) > self.model.max_length:
                said = f"prompt {prompt[:60]!r}... has {len(row.ids)} tokens"
                raise InputError(f"{said}, the model takes {self.model.max_length}")
        rows = [replace(row, begins=first) if first else row for (*_, first), row in zip(left, rows, strict=True)]
        for chosen, beside, places in self._groups([owner for owner, *_ in left]):

            def keep(found: Mapping[int, Answer], chosen: Sequence[int] = chosen) -> None:
                questions.take({names[chosen[i]]: answer for i, answer in found.items()})

            with beside or nullcontext():
                token_scores(
                    self.model,
                    [rows[i] for i in chosen],
                    self.batch_tokens,
                    owner=places,
                    enter=beside.enter if beside else lambda owners: None,
                    batch_rows=self.batch_rows,
                    each=keep,
                )
        return questions.replies()

    def scores(self, rows: Sequence[Row], progress: Tick = lambda done, total: None) -> list[Answer]:
        """Of rows that are tokenised already, by the weights as they are: what is made of their labels' tokens."""
        keyed = [(question_key("row", row.ids, row.labels), row) for row in rows]
        questions = Questions(self.store, keyed, _answer, _answer_written, progress)
        if not questions.left:
            return questions.replies()
        names = list(questions.left)

        def keep(found: Mapping[int, Answer]) -> None:
            questions.take({names[i]: answer for i, answer in found.items()})

        left = list(questions.left.values())
        token_scores(self.model, left, self.batch_tokens, batch_rows=self.batch_rows, each=keep)
        return questions.replies()

    def continuations(
        self,
        asked: Sequence[tuple[int, str]],
        texts: Sequence[str] = (),
        limit: int = LIMIT,
        progress: Tick = lambda done, total: None,
    ) -> list[Said]:
        """Greedy: what is said behind each (number of the fact, prompt), up to the end of the text, behind a token that
        holds one of `texts` (`decoding.ending`), or `limit` tokens.

        What is asked twice runs once. Raises `InputError` for a prompt that fills the model's longest row.
        """
        owned = [(self.owner(number), prompt) for number, prompt in asked]
        keyed = [(self._key("said", owner, prompt, [*texts], limit), (owner, prompt)) for owner, prompt in owned]
        questions = Questions(self.store, keyed, _said, lambda said: [said.ids, said.ended], progress)
        if not questions.left:
            return questions.replies()
        names, left = list(questions.left), list(questions.left.values())
        prompts = prompt_ids(self.model.tokenizer, [prompt for _, prompt in left])
        for (_, prompt), ids in zip(left, prompts, strict=True):
            if not 0 < len(ids) < self.model.max_length:
                named = f"prompt {prompt[:60]!r} has {len(ids)} tokens"
                raise InputError(f"{named}; expected 1 to {self.model.max_length - 1}, the model goes on from there")
        end = ending(self.model, texts)
        for chosen, beside, places in self._groups([owner for owner, _ in left]):
            with beside or nullcontext():
                told = continue_each(
                    self.model,
                    [prompts[i] for i in chosen],
                    end,
                    limit,
                    beside=beside,
                    owner=places,
                    rows=self.batch_rows,
                )
                for number, said in told:
                    questions.take({names[chosen[number]]: said})
        return questions.replies()

    def _groups(self, owners: Sequence[int]) -> Iterator[tuple[Sequence[int], Beside | None, Sequence[int]]]:
        """(which questions, the deltas beside the weights, the place of each one's among them), so many deltas at once
        as are kept on the device."""
        if not owners:
            return
        if not self.deltas:
            yield range(len(owners)), None, ()
            return
        distinct = sorted(set(owners))
        for start in range(0, len(distinct), TOGETHER):
            of = {owner: place for place, owner in enumerate(distinct[start : start + TOGETHER])}
            chosen = [i for i, owner in enumerate(owners) if owner in of]
            named = [owner for owner in of if owner != NOBODY]
            place = {owner: at for at, owner in enumerate(named)} | {NOBODY: NOBODY}
            beside = Beside(self.model, [self.deltas[owner] for owner in named])
            yield chosen, beside, [place[owners[i]] for i in chosen]

    def text(self, said: Said, special: bool = True) -> str:
        """What was said, as text; special: tokens such as the end of the text are written out."""
        text: str = self.model.tokenizer.decode(
            list(said.ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def owner(self, number: int) -> int:
        """The delta that a fact is asked under, `NOBODY` for none: what is asked under the same one runs once."""
        return number if self.deltas else NOBODY

    def _key(self, kind: str, owner: int, *asked: Any) -> str:
        return question_key(kind, self._digest(owner), *asked)

    def _digest(self, owner: int) -> str:
        """Of the fact's delta; "" for the weights as they are."""
        if not self.deltas or owner == NOBODY:
            return ""
        if owner not in self._digests:
            self._digests[owner] = digest_of(self.deltas[owner])
        return self._digests[owner]


def digest_of(update: Update) -> str:
    """24 hex digits over every number of it."""
    parts = hashlib.sha256()
    for name, factors in sorted(update.items()):
        for side in (factors.left, factors.right):
            if side is not None:
                parts.update(f"{name}:{tuple(side.shape)}".encode())
                parts.update(side.detach().cpu().contiguous().numpy().tobytes())
    return parts.hexdigest()[:24]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _answer(value: Any) -> Answer:
    labels, best, logprobs = value
    return Answer(tuple(labels), tuple(best), tuple(logprobs))


def _answer_written(answer: Answer) -> list[Any]:
    return [answer.labels, answer.best, answer.logprobs]


def _said(value: Any) -> Said:
    ids, ended = value
    return Said(tuple(ids), ended)
