"""What a model answered, on disk as it comes: an interrupted evaluation goes on, and the unedited side is asked once.

A folder belongs to the weights and everything else that an answer depends on but the question; a question is a key.
Each flush leaves a file of lines; an evaluation that ends well makes one file of them, or, of weights that nobody will
ask again, removes what it asked.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers

from ..stats.cache import cache_root, write_whole
from ..stats.tokens import tokenizer_digest
from .model import Model
from .phases import Tick
from .statistics import encode
from .value_store import weights_digest

log = logging.getLogger("rewire")

Question = TypeVar("Question")
Reply = TypeVar("Reply")

FORMAT = 2  # of the lines, and of how answers are found: who changes what an answer comes out as counts on
FLUSH = 20.0  # seconds after which answers are put on disk


def question_key(*asked: Any) -> str:
    """24 hex digits over what is asked."""
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:24]


class AnswerStore:
    """The answers of one state of one model: key -> what JSON holds. Left by an exception, `with` keeps what is there.

    keep: whether it stays on disk once an evaluation has ended well; else what was asked is removed then: it was there
        for an interruption, and what another evaluation left of the same weights stays
    A line that is broken (a process that was killed, a disk that was full) is no answer. Where the folder cannot be
    written to, that is said once, and nothing is kept.
    """

    def __init__(self, folder: Path, keep: bool = True) -> None:
        self.folder, self.keep = folder, keep
        self.new: dict[str, Any] = {}
        self.asked: set[str] = set()
        self.known = self._read()
        self.writable = True
        self.saved = time.monotonic()

    @classmethod
    def of(cls, model: Model, keep: bool = True, weights: str | None = None) -> "AnswerStore":
        """Of the model's weights as they are now; weights: their `weights_digest`, where it is known."""
        config: Any = model.hf.config
        generation: Any = getattr(model.hf, "generation_config", None)
        content = {
            "format": FORMAT,
            "weights": weights or weights_digest(model),
            "config": config.to_json_string(),
            "dtype": str(model.dtype),
            "device": model.device.type,
            "versions": [torch.__version__, transformers.__version__],
            "tokenizer": tokenizer_digest(lambda texts: encode(model, texts)),
            "ends": [getattr(generation, "eos_token_id", None), model.tokenizer.eos_token],
        }
        return cls(cache_root() / "answers" / question_key(content), keep)

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None or self.keep:
            self.flush()
        if kind is None:
            self._settle()

    def get(self, key: str) -> Any:
        """None where it is not known."""
        self.asked.add(key)
        return self.new.get(key, self.known.get(key))

    def add(self, answers: Mapping[str, Any]) -> None:
        self.new |= answers
        self.asked |= answers.keys()
        if time.monotonic() - self.saved > FLUSH:
            self.flush()

    def flush(self) -> None:
        """Puts what is new on disk."""
        self.saved = time.monotonic()
        if self.new and self.writable and self._write("part", self.new):
            self.known |= self.new
            self.new = {}

    def _settle(self) -> None:
        parts = self._files()
        if not self.writable or len(parts) < (2 if self.keep else 1):
            return
        left = self.known | self._read()  # also what other processes left
        if not self.keep:
            left = {key: value for key, value in left.items() if key not in self.asked}
        if left and not self._write("answers", left):
            return
        with contextlib.suppress(OSError):  # they are read once more; or another process' files are in the folder
            for path in parts:
                path.unlink(missing_ok=True)
            if not left:
                self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def _write(self, kind: str, answers: Mapping[str, Any]) -> bool:
        text = "".join(json.dumps([key, value]) + "\n" for key, value in answers.items()).encode()
        try:
            write_whole(self.folder / f"{kind}-{secrets.token_hex(8)}.jsonl", lambda file: file.write(text))
        except OSError as error:
            self.writable = False
            said = "%s: cannot be written to (%s): answers are not kept; set REWIRE_CACHE to another folder"
            log.warning(said, self.folder, error.strerror or error)
            return False
        return True

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        seen: set[Path] = set()
        while new := [path for path in self._files() if path not in seen]:  # another process may put them together
            seen.update(new)
            for path in new:
                with contextlib.suppress(OSError):
                    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                        with contextlib.suppress(ValueError, TypeError):
                            key, value = json.loads(line)
                            found[key] = value
        return found


class Questions(Generic[Question, Reply]):
    """Questions by their keys, each asked once: what the store knows, what is left, and what comes, kept and counted.

    read, written: a reply out of what JSON holds, and back
    left: key -> question, those without a reply, in the order they were asked
    """

    def __init__(
        self,
        store: AnswerStore | None,
        asked: Sequence[tuple[str, Question]],
        read: Callable[[Any], Reply],
        written: Callable[[Reply], Any],
        progress: Tick = lambda done, total: None,
    ) -> None:
        self._store, self._asked, self._written, self._progress = store, asked, written, progress
        self._known: dict[str, Reply] = {}
        self.left: dict[str, Question] = {}
        for key, question in asked:
            if store is not None and (value := store.get(key)) is not None:
                self._known[key] = read(value)
            else:
                self.left[key] = question
        self._total = len(self._known) + len(self.left)

    def take(self, replies: Mapping[str, Reply]) -> None:
        """What has come: by the key of its question."""
        self._known.update(replies)
        if self._store is not None:
            self._store.add({key: self._written(reply) for key, reply in replies.items()})
        self._progress(len(self._known), self._total)

    def replies(self) -> list[Reply]:
        """One for each that was asked."""
        return [self._known[key] for key, _ in self._asked]
