"""A stand-in of an OpenAI-compatible endpoint on this machine, which knows the right grades and does wrong on order."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CLAIM = re.compile(r"Question: (.*)\nGold target: (.*)\nPredicted answer: (.*)\n")


@dataclass(frozen=True)
class Wrong:
    """What comes instead of a grade. close: the connection ends "before" an answer or in the "middle" of one."""

    status: int = 200
    reply: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None
    close: str = ""
    seconds: float = 0.0


@dataclass
class JudgeServer:
    """An answer is graded A where it holds the gold target.

    wrong: question -> what its next requests get, one each; always: what every request gets that has none
    dies_after: requests after which every connection is closed; seconds: that a grade takes
    asked, graded: question -> how often; times: question -> when, seconds
    bodies: what was sent; keys: as sent; most: requests in flight at once
    """

    wrong: dict[str, list[Wrong]] = field(default_factory=dict)
    always: Wrong | None = None
    dies_after: int | None = None
    seconds: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    graded: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[float]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    in_flight: int = 0
    most: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, question: str) -> Wrong | None:
        with self.lock:
            self.asked[question] += 1
            self.times.setdefault(question, []).append(time.monotonic())
            if self.dies_after is not None and self.asked.total() > self.dies_after:
                return Wrong(close="before")
            left = self.wrong.get(question)
            return left.pop(0) if left else self.always


def handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            with server.lock:
                server.in_flight += 1
                server.most = max(server.most, server.in_flight)
            try:
                self.reply()
            except OSError:  # whoever asked is gone
                self.close_connection = True

        def reply(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question, gold, answer = _CLAIM.findall(body["messages"][-1]["content"])[-1]
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            wrong = server.next(question)
            time.sleep(wrong.seconds if wrong else server.seconds)
            grade = "A" if gold in answer else "B"
            if wrong is None or (wrong.reply is None and wrong.body is None and wrong.status == 200):
                server.graded[question] += not (wrong and wrong.close)
            content = (wrong.reply if wrong else None) or grade
            message = {"role": "assistant", "content": content}
            sent = json.dumps({"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]})
            if wrong and wrong.status != 200:
                sent = json.dumps({"error": {"message": f"no, {self.headers['Authorization']}", "code": None}})
            sent = sent if wrong is None or wrong.body is None else wrong.body
            # before the last byte: whoever has that may ask again at once
            with server.lock:
                server.in_flight -= 1
            if wrong and wrong.close:
                self.close(sent if wrong.close == "middle" else "")
                return
            self.send_response(wrong.status if wrong else 200)
            for name, value in wrong.headers if wrong else ():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent.encode())))
            self.end_headers()
            self.wfile.write(sent.encode())

        def close(self, sent: str) -> None:
            if sent:
                self.send_response(200)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent[: len(sent) // 2].encode())
                self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    return Handler


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    found = JudgeServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()
