"""A language model as judge, behind any OpenAI-compatible endpoint: many requests at once, each verdict kept."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ...stats import cache_root
from ..phases import Tick
from .claims import Claim
from .endpoint import Endpoint, quoted
from .grading import grading_prompt, prompt_digest, read_grade
from .kept import KeptVerdicts, claim_key

KEY_VARIABLE = "OPENAI_API_KEY"


class LLMJudge:
    """Grades after the manner of WILD (arXiv 2502.11177), with a prompt of our own (`grading.PROMPT`), temperature 0.

    model: as the endpoint calls it
    base_url: of the endpoint; None: $OPENAI_BASE_URL, or OpenAI's
    key_variable: environment variable with the key, which is read when the judge is prepared or first asked
    concurrency: requests in flight at most
    per_minute: requests started in a minute at most, evenly spaced; None: no limit
    retries: of a claim, after its first request
    timeout: seconds without an answer after which a request has failed
    cache: folder of the verdicts; None: `cache_root()/"judgements"`
    backoff: seconds before the first retry; doubled for each further one
    Raises `InputError` for numbers out of range and a `base_url` that is none.
    """

    name = "llm"

    def __init__(
        self,
        model: str = "gpt-4o-mini",
        base_url: str | None = None,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 8,
        per_minute: float | None = None,
        retries: int = 6,
        timeout: float = 60.0,
        cache: Path | None = None,
        backoff: float = 1.0,
    ) -> None:
        _check("concurrency", concurrency, concurrency >= 1, "1 or more")
        _check("per_minute", per_minute, per_minute is None or per_minute > 0, "more than 0")
        _check("retries", retries, retries >= 0, "0 or more")
        _check("timeout", timeout, timeout > 0, "more than 0 s")
        _check("backoff", backoff, backoff >= 0, "0 s or more")
        self.concurrency = concurrency
        self.endpoint = Endpoint(model, base_url, key_variable, per_minute, retries, timeout, backoff)
        self.cache = cache
        self.client: Any = None
        self._kept: KeptVerdicts | None = None

    def prepare(self) -> None:
        """Raises `InputError` now, before answers are generated, for a missing key or package."""
        self.client = self.client or self.endpoint.client()

    def describe(self) -> dict[str, Any]:
        """All that a verdict depends on beside its claim; the address without credentials and query."""
        about = {"model": self.endpoint.model, "base_url": self.endpoint.place, "prompt": prompt_digest()}
        return {"kind": self.name, **about, "temperature": 0}

    @property
    def path(self) -> Path:
        """The file of this judge's verdicts."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:24]
        return (self.cache or cache_root() / "judgements") / f"{digest}.jsonl"

    def verdicts(self, claims: Sequence[Claim], progress: Tick = lambda done, total: None) -> list[bool]:
        """Whether each claim is right, in their order; an empty answer is wrong, and nobody is asked.

        Claims that are the same are asked once, and what was judged before, by any process, is not asked again. What
        other processes judge once this one has begun is not seen.
        progress: counts distinct claims that are not empty
        Raises `InputError` where a claim gets no verdict; what was judged by then is kept, and the next call goes on.
        """
        keys = [claim_key(claim) for claim in claims]
        distinct = {key: claim for key, claim in zip(keys, claims, strict=True) if claim.answer.strip()}
        if self._kept is None or self._kept.path != self.path:
            self._kept = KeptVerdicts(self.path)
        kept = self._kept
        missing = [claim for key, claim in distinct.items() if key not in kept.known]
        total = len(distinct)
        progress(total - len(missing), total)
        if missing:
            try:
                self._judge(missing, kept, lambda done: progress(total - len(missing) + done, total))
            except InputError as error:
                judged = sum(key in kept.known for key in distinct)
                left = f"{judged} of {total} claims are judged and kept; the same command goes on with the others"
                raise InputError(f"{error}; {left}") from None
        return [key in distinct and kept.known[key] for key in keys]

    def _judge(self, claims: Sequence[Claim], kept: KeptVerdicts, progress: Callable[[int], None]) -> None:
        kept.prepare()
        self.prepare()
        stop = threading.Event()

        def judge(claim: Claim) -> None:
            if stop.is_set():
                return
            try:
                about = repr(quoted(claim.question))
                verdict = self.endpoint.ask(self.client, grading_prompt(claim), read_grade, stop, about)
                if verdict is not None:
                    kept.add(claim, verdict)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for done, asked in enumerate(as_completed([pool.submit(judge, claim) for claim in claims]), 1):
                    asked.result()
                    if not stop.is_set():
                        progress(done)
            finally:  # after an interrupt, too: no new request; those in flight are paid for, waited for and kept
                stop.set()


def _check(name: str, found: Any, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"the judge's {name}: {found!r} found, expected {expected}")
