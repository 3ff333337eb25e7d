"""An OpenAI-compatible endpoint that is asked until it answers: pace, back-off, and what to do when it never will."""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...kernels.errors import InputError

OFFICIAL = "https://api.openai.com/v1"
LONGEST_BACKOFF = 60.0  # seconds between two tries, where the endpoint says nothing about it
LONGEST_PAUSE = 900.0  # seconds that an endpoint may ask to be left alone before the run ends instead
_TEMPORARY = (408, 409, 429)  # and everything from 500
_QUOTED = 160  # characters of what an endpoint said
_SECRET = 8  # characters from which on a key is one, not a word for a server that needs none

T = TypeVar("T")


class Pace:
    """When the next request may start: evenly spaced, at most `per_minute`; `hold` puts all of them off."""

    def __init__(self, per_minute: float | None) -> None:
        self.interval = 60.0 / per_minute if per_minute else 0.0  # seconds
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self, stop: threading.Event) -> bool:
        """False where `stop` was set meanwhile."""
        while not stop.is_set():
            with self.lock:
                now = time.monotonic()
                if now >= self.next:
                    self.next = now + self.interval
                    return True
                left = self.next - now
            stop.wait(left)
        return False

    def hold(self, seconds: float) -> None:
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class Endpoint:
    """Chat completions of one model; threads may share it. Parameters as in `LLMJudge`."""

    def __init__(
        self, model: str, base_url: str | None, key_variable: str, per_minute: float | None,
        retries: int, timeout: float, backoff: float,
    ) -> None:  # fmt: skip
        self.model, self.key_variable = model, key_variable
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL
        self.place = public_url(self.base_url)
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self.pace = Pace(per_minute)
        self.dice = random.Random()  # of its own: the seeded one of the run stays where it is

    def client(self) -> Any:
        """Reads the key. Raises `InputError` where it, or the package, is missing."""
        try:
            import openai
        except ImportError:
            raise InputError("a language model judges through openai: pip install rewire[judge]") from None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            what = f"the key of {self.place} (any word where it needs none)"
            raise InputError(f"{self.key_variable} is not set: set it to {what}, or judge by exact match")
        if not key.isascii() or not key.isprintable() or " " in key:  # would be quoted by whoever refuses the header
            raise InputError(f"{self.key_variable}: holds spaces or other signs that no key has; set the key as issued")
        # tries are counted here: those of the client could be neither paced nor stopped
        return openai.OpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=0)

    def ask(
        self, client: Any, text: str, read: Callable[[str], T | None], stop: threading.Event, about: str
    ) -> T | None:
        """What `read` finds in the reply to `text`; None where `stop` was set before there was one.

        read: gives None for a reply that is none; then, as after a temporary failure, the model is asked again, up to
        `retries` times with growing waits, or when the endpoint says
        about: names what is asked, in errors
        Raises `InputError` for a failure that stays.
        """
        import openai

        last = ""
        for attempt in range(self.retries + 1):
            if attempt:
                wait = min(LONGEST_BACKOFF, self.backoff * 2.0 ** (attempt - 1))
                stop.wait(wait * self.dice.uniform(0.5, 1.0))  # not all at once
            if not self.pace.wait(stop):
                return None
            try:
                reply = self._reply(client, text)
                found = read(reply)
                if found is not None:
                    return found
                last = f"the reply is {quoted(reply, client.api_key)!r}, expected A or B"
            except openai.APIStatusError as error:
                self._refuse(error, client.api_key, about)
                last = f"status {error.status_code}"
                self._pause(error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                last = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError:
                last = "no connection, or a lost one"
        tries = "1 try" if not self.retries else f"{self.retries + 1} tries"
        raise InputError(f"{self.place}: no verdict of {self.model} about {about} in {tries} ({last})")

    def _reply(self, client: Any, text: str) -> str:
        """Read by ourselves: what is no completion (a web page, an error with status 200) counts as a useless reply."""
        messages = [{"role": "user", "content": text}]
        raw = client.chat.completions.with_raw_response.create(model=self.model, messages=messages, temperature=0)
        body: bytes = raw.http_response.content
        try:
            return str(json.loads(body)["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError):
            return body.decode(errors="replace")

    def _refuse(self, error: Any, key: str, about: str) -> None:
        """Raises `InputError` for what no further try changes, mostly in our words: theirs may quote the key."""
        status, variable = error.status_code, self.key_variable
        if status == 401:
            reason = f"the key in {variable} is refused (401): set {variable} to a valid key of this endpoint"
        elif status == 403:
            reason = f"the key in {variable} may not use {self.model} (403): set another key or another model"
        elif status == 404:
            reason = f"no model {self.model!r}, or no such endpoint (404): set the model, or base_url (most end in /v1)"
        elif error.code == "insufficient_quota":
            reason = f"the account of the key in {variable} has no credit left ({status}): add some, or set another key"
        elif status in _TEMPORARY or status >= 500:
            return
        else:
            reason = f"the request about {about} is refused ({status}: {quoted(str(error.message), key)})"
        raise InputError(f"{self.place}: {reason}") from None

    def _pause(self, after: str | None) -> None:
        seconds = retry_after(after)
        if seconds > LONGEST_PAUSE:
            raise InputError(f"{self.place}: asks to be left alone for {seconds:.0f} s: come back then") from None
        self.pace.hold(seconds)


def public_url(url: str) -> str:
    """Without credentials and query. Raises `InputError` for what is no http address."""
    try:
        parts = urlsplit(url)
        scheme, host, path = parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
    except ValueError:  # a bracket that is not closed
        scheme, host, path = "", "", ""
    if scheme not in ("http", "https") or not host:
        shown = url.rpartition("@")[2].partition("?")[0]
        raise InputError(f"base_url: {shown!r} found, expected an http address, as {OFFICIAL}")
    return f"{scheme}://{host}{path}"


def retry_after(value: str | None) -> float:
    """Seconds, of a Retry-After header: seconds or a date (RFC 9110 §10.2.3); 0 where it says neither."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def quoted(text: str, key: str = "") -> str:
    """On one line, not too long, and without the key, which an endpoint may repeat (a few letters are no secret)."""
    text = " ".join((text.replace(key, "***") if len(key) >= _SECRET else text).split())
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."
