"""Verdicts on disk: a line each, appended the moment it arrives, so that none is paid for twice."""

import hashlib
import json
import os
import threading
from pathlib import Path

from ...kernels.errors import InputError
from .claims import Claim


def claim_key(claim: Claim) -> str:
    """24 hex digits over question, accepted answers and answer."""
    content = json.dumps([claim.question, list(claim.gold), claim.answer])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


class KeptVerdicts:
    """One JSONL file of {"key", "correct", "question", "gold", "answer"}; the claim is there for people to read.

    Appended to and never rewritten: a killed process leaves whole lines and at most a torn last one, which is not
    read and which the next line does not continue. Several processes and threads may append at once.
    Raises `InputError` where the file can be neither read nor made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, bool] = {}
        self.lock = threading.Lock()
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise self._refusal("read", error) from None
        for line in lines:
            try:
                record = json.loads(line)
                key, correct = record["key"], record["correct"]
            except (ValueError, KeyError, TypeError):
                continue  # torn: it is asked again
            if isinstance(key, str) and isinstance(correct, bool):
                self.known.setdefault(key, correct)

    def prepare(self) -> None:
        """Before anything is paid for: raises `InputError` where nothing could be kept."""
        self._append(b"")

    def add(self, claim: Claim, correct: bool) -> None:
        """On return the line is the operating system's, which outlives this process."""
        key = claim_key(claim)
        about = {"question": claim.question, "gold": list(claim.gold), "answer": claim.answer}
        with self.lock:
            self._append(json.dumps({"key": key, "correct": correct} | about).encode() + b"\n")
            self.known[key] = correct

    def _append(self, line: bytes) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:
                if line and file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # away from a torn one
                if file.write(line) != len(line):  # in one write, so that lines of several processes never mix
                    raise OSError("no space left")
        except OSError as error:
            raise self._refusal("written to", error) from None

    def _refusal(self, what: str, error: OSError) -> InputError:
        reason = error.strerror or error
        return InputError(f"{self.path}: cannot be {what} ({reason}): set REWIRE_CACHE to a folder for the verdicts")
