"""What a model goes on to say, greedily: many prompts at once, keys and values kept, stopped by what a token holds.

Prompts are read in batches padded on the right, without a mask; a beginning that all of them share is read once. What
is kept of each is then moved so that all rows end in one column, and a step reads one token of each row. Rows that are
done leave, and when half of the places are free waiting prompts take them: a row's path depends on nothing but its
prompt (in exact arithmetic).

A family that cannot be continued so (`can_keep` tries it) is read anew for every token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.errors import InputError
from ..stats.collect import batches
from ..stats.memory import free_bytes
from .beside import Beside
from .endings import Ending, ending
from .kept import Kept, joined, taken, with_room
from .model import Model
from .passes import MEMORY_SHARE, before_head, forward_bytes, fused, tokens_that_fit
from .phases import Tick
from .prompts import prompt_ids

LIMIT = 50  # tokens of an answer (arXiv 2502.11177)
CPU_ROWS, GPU_ROWS = 128, 1024  # continued at once
LEAST_SHARED = 4  # tokens of a common beginning that are worth a forward of their own
DEAD = 1 / 8  # share of rows that have ended, from which on they are taken out: that copies the rest
POLL = 8  # steps of a GPU between two looks at what was said: each look waits for it
TRIAL = (5, 2, 9)  # tokens of the prompts that `can_keep` tries, which goes on by as many as the second
TOLERANCE = 1e-3  # of the largest logit, in float32: what keeping may change there


@dataclass(frozen=True)
class Said:
    """ids: the tokens behind the prompt, the one that ended it among them; ended: "stop", or "length" at the limit."""

    ids: tuple[int, ...]
    ended: str


@torch.no_grad()
def continue_each(
    model: Model,
    prompts: Sequence[Sequence[int]],
    end: Ending,
    limit: int = LIMIT,
    *,
    beside: Beside | None = None,
    owner: Sequence[int] = (),
    rows: int | None = None,
    progress: Tick = lambda done, total: None,
) -> Iterator[tuple[int, Said]]:
    """(number of the prompt, what is said behind it), each as it ends.

    prompts: token ids, one at least
    limit: tokens at most; a row that reaches the model's longest one ends there
    beside: deltas beside the weights, entered; owner: the delta of each prompt, -1 for none
    rows: continued at once; None: from the free memory
    Raises `InputError` for a prompt that fills the model's longest row.
    """
    for ids in prompts:
        if not 0 < len(ids) < model.max_length:
            raise InputError(f"a prompt of {len(ids)} tokens cannot be continued: the model takes {model.max_length}")
    if not prompts or limit < 1:
        return
    with fused(model):
        keep = can_keep(model, None if beside is None else beside)
        run = _Run(model, prompts, end, limit, beside, owner, keep)
        places = rows or _places(model, max(map(len, prompts)) + limit)
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        running: _Rows | None = None
        done = 0
        while waiting or running is not None:
            ended: list[tuple[int, Said]] = []
            if running is not None and run.due(running):
                ended, running = run.look(running)
            if waiting and (running is None or (not running.unseen and sum(running.live) <= places // 2)):
                free = places - (0 if running is None else sum(running.live))
                at_once, fresh = run.look(run.read(waiting[:free]))
                del waiting[:free]
                ended += at_once
                if fresh is not None:
                    running = fresh if running is None else running.chosen().with_others(fresh.chosen())
            for number, answer in ended:
                done += 1
                yield number, answer
            if ended:
                progress(done, len(prompts))
            if running is not None:
                run.step(running)


def _places(model: Model, longest: int) -> int:
    config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = model.dtype.itemsize
    a_row = longest * 4.0 * heads * width * model.anatomy.n_layers * size  # keys and values, twice while rows move
    cap = GPU_ROWS if model.device.type == "cuda" else CPU_ROWS
    return max(1, min(cap, int(MEMORY_SHARE * free_bytes(model.device) / a_row)))


@dataclass
class _Rows:
    """Rows that are continued.

    numbers: which prompt each is; live: whether it goes on; said: its tokens that were looked at
    tails: the text that its last tokens spell
    kept: of all tokens but `next`; None where nothing is kept
    real: [rows, columns] int64, which columns of what is kept are not empty
    next: [rows] the last token, not read yet; at: [rows] its position
    unseen: tokens of the steps since the last look, each [rows]
    """

    numbers: list[int]
    live: list[bool]
    said: list[list[int]]
    tails: list[str]
    kept: Kept | None
    real: Tensor
    next: Tensor
    at: Tensor
    unseen: list[Tensor]

    def chosen(self) -> "_Rows":
        """Those that go on; columns that none of them fills are gone."""
        places = [place for place, live in enumerate(self.live) if live]
        if len(places) == len(self.live):
            return self
        index = torch.tensor(places, device=self.next.device)
        real, kept, empty = self.real[index], None, 0
        if self.kept is not None:
            empty = int((real.cumsum(1) == 0).all(0).sum())
            kept = self.kept.each(lambda side: side[index.to(side.device), :, empty:], real.shape[1] - empty)
        return _Rows(
            [self.numbers[i] for i in places],
            [True] * len(places),
            [self.said[i] for i in places],
            [self.tails[i] for i in places],
            kept,
            real[:, empty:],
            self.next[index],
            self.at[index],
            [tokens[index] for tokens in self.unseen],
        )

    def with_others(self, others: "_Rows") -> "_Rows":
        """Both, moved so that all end in one column."""
        columns = max(self.real.shape[1], others.real.shape[1])
        parts = (self, others)
        kept = None
        if self.kept is not None and others.kept is not None:
            kept = joined([part.kept for part in parts if part.kept is not None], columns)
        return _Rows(
            self.numbers + others.numbers,
            self.live + others.live,
            self.said + others.said,
            self.tails + others.tails,
            kept,
            torch.cat([nn.functional.pad(part.real, (columns - part.real.shape[1], 0)) for part in parts]),
            torch.cat([part.next for part in parts]),
            torch.cat([part.at for part in parts]),
            [],
        )


class _Run:
    """What all steps of one call share."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        end: Ending,
        limit: int,
        beside: Beside | None,
        owner: Sequence[int],
        keep: bool,
    ) -> None:
        self.model, self.prompts, self.end, self.limit, self.keep = model, prompts, end, limit, keep
        self.beside, self.owner = beside, owner
        self.stops = set(end.table.nonzero()[:, 0].tolist())
        self.spells = max(map(len, end.spelled), default=0)
        self.poll = POLL if model.device.type == "cuda" else 1
        self.entered: list[int] | None = None

    def _enter(self, numbers: list[int]) -> None:
        if self.beside is not None and numbers != self.entered:
            self.beside.owner = torch.tensor([self.owner[i] for i in numbers], dtype=torch.int64)
        self.entered = list(numbers)

    def read(self, numbers: Sequence[int]) -> _Rows:
        """Prompts read, each with its first token."""
        model, prompts = self.model, self.prompts
        shared = self._shared(numbers) if self.keep else 0
        beginnings = self._beginnings(numbers, shared) if shared else None
        parts: list[_Rows] = []
        rests = [len(prompts[i]) - shared for i in numbers]
        for batch in batches(rests, tokens_that_fit(model, forward_bytes(model))):
            chosen = [numbers[i] for i in batch]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(prompts[i][shared:]) for i in chosen], batch_first=True)
            kept = (
                (Kept() if beginnings is None else self._begun(beginnings, chosen, ids.shape[1])) if self.keep else None
            )
            more: dict[str, Any] = {}
            if shared:
                more["position_ids"] = (shared + torch.arange(ids.shape[1], device=model.device)).expand(*ids.shape)
            self._enter(chosen)
            hidden = self._hidden(ids.to(model.device), kept, **more)
            lengths = torch.tensor([len(prompts[i]) for i in chosen], device=hidden.device)
            best = self._best(hidden[torch.arange(len(chosen), device=hidden.device), lengths - shared - 1])
            columns = int(lengths.max())
            # padded on the right so far: moved so that all end in the last column
            place = torch.arange(columns, device=lengths.device) - (columns - lengths[:, None])
            if kept is not None:
                kept = kept.each(partial(taken, place=place.clamp_min(0)), columns)
            spelled = [
                self._tail("".join(self.end.surface[t] for t in prompts[i][-self.spells :] if self.spells))
                for i in chosen
            ]
            parts.append(
                _Rows(
                    chosen,
                    [True] * len(chosen),
                    [[] for _ in chosen],
                    spelled,
                    kept,
                    (place >= 0).long().to(model.device),
                    best,
                    lengths.to(model.device),
                    [],
                )
            )
        whole = reduce(_Rows.with_others, parts)
        whole.unseen = [whole.next]
        return whole

    def _shared(self, numbers: Sequence[int]) -> int:
        """Tokens that all these prompts begin with, where they are worth it; each has one more at least."""
        if len(numbers) < 2:
            return 0
        prompts = [tuple(self.prompts[i]) for i in numbers]
        low, high = min(prompts), max(prompts)
        same = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        same = min(same, min(len(self.prompts[i]) for i in numbers) - 1)
        return same if same >= LEAST_SHARED else 0

    def _beginnings(self, numbers: Sequence[int], shared: int) -> tuple[dict[int, int], Kept]:
        """What is kept of the common beginning under each delta, and where each delta's stands."""
        owners = {self.owner[i] if self.beside is not None else -1: i for i in numbers}
        kept = Kept()
        chosen = list(owners.values())
        self._enter(chosen)
        ids = torch.tensor([self.prompts[i][:shared] for i in chosen], device=self.model.device)
        self._hidden(ids, kept)
        return {name: place for place, name in enumerate(owners)}, kept

    def _begun(self, beginnings: tuple[dict[int, int], Kept], chosen: list[int], more: int) -> Kept:
        places, held = beginnings
        index = torch.tensor([places[self.owner[i] if self.beside is not None else -1] for i in chosen])
        room = held.columns + more
        return held.each(lambda side: with_room(side[index.to(side.device), :, : held.columns], room), held.columns)

    def step(self, rows: _Rows) -> None:
        """One token more of each row."""
        self._enter(rows.numbers)
        if rows.kept is None:
            rows.next = self._anew(rows)
        else:
            rows.real = nn.functional.pad(rows.real, (0, 1), value=1)
            hidden = self._hidden(
                rows.next[:, None], rows.kept, position_ids=rows.at[:, None], attention_mask=rows.real
            )
            rows.next = self._best(hidden[:, -1])
        # a row that has ended goes along until it is taken out, and models have no positions past their longest row
        rows.at = (rows.at + 1).clamp_max(self.model.max_length - 1)
        rows.unseen.append(rows.next)

    def due(self, rows: _Rows) -> bool:
        """Whether to look at what was said: each look waits for the device."""
        return len(rows.unseen) >= self.poll

    def look(self, rows: _Rows) -> tuple[list[tuple[int, Said]], _Rows | None]:
        """(what has ended, the rows as they go on: None where none does)."""
        new = torch.stack(rows.unseen, 1).tolist()
        rows.unseen = []
        ended: list[tuple[int, Said]] = []
        for place, (number, tokens) in enumerate(zip(rows.numbers, new, strict=True)):
            if not rows.live[place]:
                continue
            said = rows.said[place]
            room = min(self.limit, self.model.max_length - len(self.prompts[number]))
            for token in tokens:
                said.append(token)
                stopped = token in self.stops or self._spelled(rows, place, token)
                if stopped or len(said) >= room:
                    ended.append((number, Said(tuple(said), "stop" if stopped else "length")))
                    rows.live[place] = False
                    break
        alive = sum(rows.live)
        if not alive:
            return ended, None
        return ended, rows.chosen() if alive <= len(rows.live) * (1 - DEAD) else rows

    def _spelled(self, rows: _Rows, place: int, token: int) -> bool:
        if not self.spells:
            return False
        tail = rows.tails[place] + self.end.surface[token]
        rows.tails[place] = self._tail(tail)
        return any(text in tail for text in self.end.spelled)

    def _tail(self, text: str) -> str:
        """As much as can be the beginning of what the next token completes: nothing that is whole already."""
        return text[-self.spells + 1 :] if self.spells > 1 else ""

    def _anew(self, rows: _Rows) -> Tensor:
        """The next token of each row by reading it all again."""
        fresh = torch.stack(rows.unseen, 1).tolist() if rows.unseen else [[] for _ in rows.numbers]
        whole = [
            [*self.prompts[i], *said, *new][: self.model.max_length]
            for i, said, new in zip(rows.numbers, rows.said, fresh, strict=True)
        ]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in whole], batch_first=True)
        hidden = self._hidden(ids.to(self.model.device), None)
        last = torch.tensor([len(row) - 1 for row in whole], device=hidden.device)
        return self._best(hidden[torch.arange(len(whole), device=hidden.device), last])

    def _best(self, hidden: Tensor) -> Tensor:
        best: Tensor = self.model.logits(hidden).argmax(-1)
        return best.to(self.model.device)

    def _hidden(self, ids: Tensor, kept: Kept | None, **more: Any) -> Tensor:
        if kept is not None:
            more |= {"past_key_values": kept, "use_cache": True}
        return before_head(self.model, ids, **more)


def continuations(model: Model, prompts: Sequence[str], tokens: int) -> list[str]:
    """What the model says behind each prompt, at most so many tokens; nothing behind one that fills its longest row."""
    coded = prompt_ids(model.tokenizer, prompts)
    fits = [i for i, ids in enumerate(coded) if 0 < len(ids) < model.max_length]
    said = dict(continue_each(model, [coded[i] for i in fits], ending(model), tokens))
    texts = [""] * len(prompts)
    for place, i in enumerate(fits):
        texts[i] = model.tokenizer.decode(said[place].ids, skip_special_tokens=True)
    return texts


@torch.no_grad()
def can_keep(model: Model, beside: Beside | None = None) -> bool:
    """Whether rows of several lengths can be continued from what was kept of them, by trying: logits are as of rows
    that are read anew.

    False where a family takes no positions or masks, or keeps something of its own.
    """
    more = TRIAL[1]
    tokens = [[(i * 7919 + j * 104729) % model.anatomy.vocab for j in range(n + more)] for i, n in enumerate(TRIAL, 1)]
    prompts = [row[:-more] for row in tokens]
    never = Ending(torch.zeros(model.anatomy.vocab, dtype=torch.bool))
    run = _Run(model, prompts, never, more, beside, [-1] * len(prompts), True)
    try:
        rows = run.read(range(len(prompts)))
        assert rows.kept is not None
        for step in range(more):
            rows.real = nn.functional.pad(rows.real, (0, 1), value=1)
            read = torch.tensor([tokens[i][len(prompts[i]) + step] for i in rows.numbers], device=model.device)
            run._enter(rows.numbers)
            kept = run._hidden(read[:, None], rows.kept, position_ids=rows.at[:, None] + step, attention_mask=rows.real)
        for place, number in enumerate(rows.numbers):
            run._enter([number])
            alone = run._hidden(torch.tensor([tokens[number]], device=model.device), None)
            wanted, found = model.logits(alone[0, -1:]), model.logits(kept[place, -1:])
            eps = max(TOLERANCE, 8 * torch.finfo(model.dtype).eps)
            if not bool((found - wanted).abs().max() <= eps * wanted.abs().max().clamp_min(1)):
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a family says to positions, masks or what is kept
        return False
    return True
