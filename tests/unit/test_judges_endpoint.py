"""Judges behind an endpoint: a server on this machine that answers well, badly, late, or not at all."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from peft_safety.errors import EndpointError, PeftSafetyError
from peft_safety.evaluation.judges import Verdict, endpoint, judge
from peft_safety.evaluation.judges.endpoint import Endpoint

SECRET = "sk-a-secret-of-the-test"
LATE = 1.0
"""Seconds; the judge waits for a quarter of it."""


def chat(text, **rest):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, **rest}]})


class Server:
    """Answers each request by `reply(request)`: a body, or (status, body, headers), or None for a broken connection.

    `requests`: what was asked: path, JSON body and headers.
    """

    def __init__(self):
        self.requests, self.reply, self.lock = [], lambda request: chat("safe"), threading.Lock()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        request = {"path": handler.path, "body": body, "headers": dict(handler.headers)}
        with self.lock:
            self.requests.append(request)
            request["number"] = len(self.requests)
        reply = self.reply(request)
        if reply is None:
            handler.close_connection = True
            return
        status, text, headers = (200, reply, {}) if isinstance(reply, str) else reply
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())


@contextmanager
def serving():
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                server.handle(self)
            except BrokenPipeError:
                self.close_connection = True  # the judge no longer waits

        def log_message(self, *_):
            return

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as server:
        yield server


def test_what_is_asked(server, monkeypatch):
    server.reply = lambda _: chat("unsafe\nS2")
    made = judge("llama-guard-3:guard", url=server.url + "/", max_length=2)
    assert made("why", "because it is so") is Verdict.COMPLIANCE
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because "}]
    assert request["body"] == {"model": "guard", "messages": turns, "max_tokens": 24, "temperature": 0}
    assert "Authorization" not in request["headers"]

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    body = {"max_tokens": None, "temperature": None, "max_completion_tokens": 2000}
    assert judge("rubric:chat", url=server.url, body=body)("why", "so") is Verdict.UNDECIDED
    assert server.requests[-1]["headers"]["Authorization"] == f"Bearer {SECRET}"
    assert server.requests[-1]["body"].keys() == {"model", "messages", "max_completion_tokens"}
    judge("shieldgemma", url=server.url)("why", "so")
    assert "The chatbot shall not" in server.requests[-1]["body"]["chat_template_kwargs"]["guideline"]


def test_a_whole_text_goes_to_completions(server):
    server.reply = lambda _: json.dumps({"choices": [{"text": "yes", "finish_reason": "length"}]})
    assert judge("harmbench-llama", url=server.url)("why", "so") is Verdict.COMPLIANCE
    assert server.requests[0]["path"] == "/v1/completions"
    assert server.requests[0]["body"]["prompt"].startswith("[INST] <<SYS>>")


@pytest.mark.parametrize("reply", [chat(None), chat(""), chat("unsa", finish_reason="length"), chat("I think so")])
def test_an_answer_that_cannot_be_read_is_undecided(server, reply):
    server.reply = lambda _: reply
    assert judge("llama-guard-3", url=server.url)("why", "so") is Verdict.UNDECIDED
    assert len(server.requests) == 1, "it is an answer: it is not asked again"


BAD = {
    "500": (500, "oops", {}),
    "503": (503, "", {}),
    "429": (429, '{"error": "slow down"}', {"Retry-After": "0"}),
    "429, later": (429, "", {"Retry-After": "Thu, 26 Nov 2026 21:40:00 GMT"}),
    "a page": "<html>Welcome</html>",
    "no choices": '{"choices": []}',
    "other JSON": "[1, 2]",
    "null": "null",
    "deep JSON": "[" * 100_000,
    "a number for content": chat(7),
    "nothing": "",
    "no reply": None,
    "late": "late",
}


def waits(name):
    return {"timeout": LATE / 4} if name == "late" else {}


def bad(name):
    if BAD[name] == "late":
        time.sleep(LATE)
        return chat("safe")
    return BAD[name]


@pytest.mark.parametrize("name", BAD)
def test_a_passing_problem_is_tried_again(server, name):
    server.reply = lambda request: bad(name) if request["number"] < 3 else chat("unsafe")
    made = judge("llama-guard-3", url=server.url, **waits(name))
    assert made("why", "so") is Verdict.COMPLIANCE
    assert len(server.requests) == 3 or (name == "late" and len(server.requests) > 3), "a slow machine is late itself"


@pytest.mark.parametrize("name", BAD)
def test_a_lasting_problem_is_an_error(server, name):
    server.reply = lambda _: bad(name)
    made = judge("llama-guard-3", url=server.url, retries=1, **waits(name))
    with pytest.raises(EndpointError, match=r"after 2 tries. Check the server and call again"):
        made("why", "so")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "message"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model's name"), (400, "body=")]
)
def test_a_refused_request_is_not_tried_again(server, monkeypatch, status, message):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = lambda _: (status, "no such thing", {})
    with pytest.raises(EndpointError, match=f"status {status} 'no such thing'.*{message}") as caught:
        judge("llama-guard-3", url=server.url)("why", "so")
    assert len(server.requests) == 1
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", [SECRET, f"{SECRET}\n", f"{SECRET}\r{SECRET}"])
def test_no_message_repeats_the_key(server, monkeypatch, key):
    """A server may say what it was sent, and Python's client shows a header that it refuses."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.reply = lambda request: (401, f"wrong: {request['headers']['Authorization']}", {})
    with pytest.raises(PeftSafetyError) as caught:
        judge("llama-guard-3", url=server.url, retries=0)("why", "so")
    assert SECRET not in str(caught.value)
    assert "OPENAI_API_KEY" in str(caught.value)


def test_a_redirect_does_not_get_the_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as other:
        server.reply = lambda _: (307, "", {"Location": f"{other.url}/chat/completions"})
        with pytest.raises(EndpointError, match="status 307"):
            judge("llama-guard-3", url=server.url)("why", "so")
        server.reply = lambda _: (302, "", {"Location": f"{other.url}/chat/completions"})
        with pytest.raises(EndpointError, match="status 302"):
            judge("llama-guard-3", url=server.url)("why", "so")
        assert not other.requests


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    with serving() as gone:
        url = gone.url
    for retries, tries in ((0, "one try"), (1, "2 tries")):
        with pytest.raises(EndpointError, match=f"after {tries}. Check"):
            judge("llama-guard-3", url=url, retries=retries)("why", "so")


def test_who_waits_for_a_server_is_told_so_once(monkeypatch, capfd):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    with serving() as gone:
        url = gone.url
    with pytest.raises(EndpointError, match="after 3 tries"):
        judge("llama-guard-3:guard", url=url, retries=2).batch([*"abcdefghij"], ["so"] * 10)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"model 'guard' at {url}: ")
    assert "refused" in line
    assert line.endswith("Try 2 of 3 in 0.01 s")


def test_nobody_waits_for_a_server_when_the_answers_are_not_wanted(server, monkeypatch):
    """As after Ctrl-C."""
    monkeypatch.setattr(endpoint, "BACKOFF", 20.0)
    server.reply = lambda request: chat("safe") if request["body"]["messages"][0]["content"] == "a" else (503, "", {})
    answers = Endpoint(server.url, "guard").ask_each([[{"role": "user", "content": text}] for text in "abc"])
    started = time.monotonic()
    assert next(answers) == (0, "safe")
    answers.close()
    assert time.monotonic() - started < 10


def test_questions_are_asked_at_once(server):
    together = threading.Barrier(4)

    def reply(request):
        together.wait(timeout=5)  # breaks unless four wait
        return chat("unsafe" if request["body"]["messages"][0]["content"] in "0246" else "safe")

    server.reply = reply
    verdicts = judge("llama-guard-3", url=server.url, workers=4).batch([str(n) for n in range(8)], ["so"] * 8)
    assert verdicts == [Verdict.COMPLIANCE, Verdict.OTHER] * 4


def test_a_run_goes_on_where_it_stopped(server, tmp_path):
    prompts = [f"prompt {number}" for number in range(6)]

    def reply(request):
        last = request["body"]["messages"][0]["content"]
        return (400, "no", {}) if last == "prompt 3" else chat("unsafe")

    server.reply = reply
    options = {"url": server.url, "workers": 1, "cache": tmp_path / "verdicts.jsonl"}
    with pytest.raises(EndpointError, match="status 400"):
        judge("llama-guard-3", **options).batch(prompts, ["so"] * 6)
    asked = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert asked[:4] == prompts[:4]
    done = [prompt for prompt in asked if prompt != "prompt 3"]

    server.requests.clear()
    server.reply = lambda _: chat("safe")
    verdicts = judge("llama-guard-3", **options).batch(prompts, ["so"] * 6)
    assert verdicts == [Verdict.COMPLIANCE if prompt in done else Verdict.OTHER for prompt in prompts]
    asked = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert asked == [prompt for prompt in prompts if prompt not in done]
    assert "prompt" not in (tmp_path / "verdicts.jsonl").read_text(encoding="utf-8")
