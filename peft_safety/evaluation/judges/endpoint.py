"""Judges behind an OpenAI-compatible endpoint: a service, or a server of vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any
from urllib import error as failures
from urllib import request as requests

from peft_safety.errors import ConfigError, EndpointError
from peft_safety.evaluation.judges.base import Family
from peft_safety.evaluation.kept import key_of

KEY = "OPENAI_API_KEY"
_ADDRESS = re.compile(r"https?://[^\s/?#@]+(?:/[^\s?#@]*)?")
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that a later try may not have."""
BACKOFF, LONGEST_WAIT = 1.0, 30.0
"""Seconds before the second try, doubled with each, and at most; a server's Retry-After counts within that."""
QUIET = 30.0
"""Seconds between two lines that say what is waited for."""
_SPEAKING = threading.Lock()
LARGEST_REPLY = 1 << 24
CHARACTERS = 4
"""Of a token, about: there is no tokenizer here."""


class _NoRedirects(requests.HTTPRedirectHandler):
    """A redirect would take the key, and the texts, to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A model behind `url`, which ends where "/chat/completions" begins ("http://localhost:8000/v1").

    The key is read from the environment variable OPENAI_API_KEY, if there is one, and never written anywhere. Lines on
    stderr say that a question is asked again, and why.

    Args:
        timeout: seconds without an answer.
        retries: further tries after a timeout, an answer that is not one, or a passing status (429, 5xx).
        workers: questions at once.
        body: further fields of the request; None leaves a field out (`{"temperature": None}`).
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        workers: int = 8,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        if not _ADDRESS.fullmatch(url):
            remedy = "Give one such as http://localhost:8000/v1, without a user name or a query."
            raise ConfigError(f"judge {model!r}: url= is no such address. {remedy}")
        if timeout <= 0 or retries < 0 or workers < 1:
            raise ConfigError(f"judge {model!r}: timeout = {timeout}, retries = {retries}, workers = {workers}.")
        self.url, self.model, self.body = url.rstrip("/"), model, dict(body or {})
        self.timeout, self.retries, self.workers = timeout, retries, workers
        self._opener = requests.build_opener(_NoRedirects)
        self._said = -math.inf

    @property
    def version(self) -> str:
        """A server does not say which weights it has; but what else it is sent decides its answers."""
        return f"served, body {key_of(self.body)[:16]}" if self.body else "served"

    def shorten(self, text: str, tokens: int) -> str:
        return text[: tokens * CHARACTERS]

    def answers(self, family: Family, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, str]]:
        """What the model says of each pair, in any order, with the pair's number."""
        more = {"chat_template_kwargs": dict(family.variables)} if family.variables else {}
        questions = [family.question(*pair) for pair in pairs]
        return self.ask_each(questions, max_tokens=family.tokens, temperature=0, **more)

    def ask_each(self, questions: Sequence[Any], **fields: Any) -> Iterator[tuple[int, str]]:
        """The model's answers to texts or lists of turns, in any order, each with its number. Raises the first error
        after the answers that were on their way.
        """
        pool, stop = ThreadPoolExecutor(self.workers), threading.Event()
        try:
            running: dict[Future[str], int] = {
                pool.submit(self._ask, question, fields, stop): number for number, question in enumerate(questions)
            }
            failed: BaseException | None = None
            for future in as_completed(running):
                if future.cancelled():
                    continue
                problem = future.exception()
                if problem is None:
                    yield running[future], future.result()
                elif failed is None:
                    failed = problem
                    stop.set()
                    for other in running:
                        other.cancel()
            if failed is not None:
                raise failed
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: Any, fields: Mapping[str, Any], stop: threading.Event) -> str:
        """The model's answer to one text or list of turns, which is not asked for again after `stop`."""
        path, content = ("completions", "prompt") if isinstance(question, str) else ("chat/completions", "messages")
        every = {"model": self.model, content: question, **fields, **self.body}
        body = json.dumps({key: value for key, value in every.items() if value is not None})
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, "").strip():  # a secret's line end is no part of it
            if not (key.isascii() and key.isprintable()):  # Python's error would show it
                raise ConfigError(f"{KEY} holds a character that no key has. Set it again.")
            headers["Authorization"] = f"Bearer {key}"
        problem = ""
        for attempt in range(self.retries + 1):
            wait = BACKOFF * 2**attempt
            try:
                asked = requests.Request(f"{self.url}/{path}", body.encode(), headers)
                with self._opener.open(asked, timeout=self.timeout) as reply:
                    return _text(json.loads(reply.read(LARGEST_REPLY)))
            except failures.HTTPError as error:
                problem = _without(key, f"status {error.code} {_excerpt(error)!r}")
                if error.code not in PASSING:
                    remedy = f"Set {KEY}." if error.code in {401, 403} else "Check url=, the model's name and body=."
                    raise EndpointError(f"model {self.model!r} at {self.url}: {problem}. {remedy}") from None
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, LookupError, TypeError, ValueError, RecursionError, http.client.HTTPException) as error:
                problem = _without(key, f"{type(error).__name__}: {error}")
            if attempt < self.retries:
                wait = min(wait, LONGEST_WAIT)
                self._say(f"{problem}. Try {attempt + 2} of {self.retries + 1} in {wait:g} s")
                if stop.wait(wait):
                    break
        tries = f"{attempt + 1} tries" if attempt else "one try"
        said = f"model {self.model!r} at {self.url}: {problem}, after {tries}"
        raise EndpointError(f"{said}. Check the server and call again; what a cache holds is not asked again.")

    def _say(self, text: str) -> None:
        """A line on stderr, above a progress bar; one of many when a server is down."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with _SPEAKING:
            if time.monotonic() < self._said + QUIET:
                return
            self._said = time.monotonic()
            line = f"model {self.model!r} at {self.url}: {text}"
            tqdm.write("".join(x if x.isprintable() else "?" for x in line), file=sys.stderr)


def _without(key: str, text: str) -> str:
    """A server's or library's message, which may repeat what it was sent."""
    return text.replace(key, f"${KEY}") if key else text


def _text(reply: Any) -> str:
    choice = reply["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, (str, type(None))):
        raise TypeError(f"the reply's content is a {type(text).__name__}")
    return text or ""


def _excerpt(error: failures.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdecimal() else 0.0
