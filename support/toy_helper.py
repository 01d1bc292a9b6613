"""A scripted helper that knows the toy's true facts, to try Full DyME without a language model.

    python -m support.toy_helper 8000 &
    python dyme.py --helper-url http://127.0.0.1:8000/v1 --helper-model toy --out runs/full
"""

import contextlib
import http.server
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from support import thinking, toy

# The reply to a prompt, the n-th: a text, a status, or a fault (hang, drip, garbage, wrong).
Script = Callable[[str, int], str | int]
CUT_OFF = "(cut off)"  # a reply that ends so says that it met its limit of tokens


class Server(http.server.ThreadingHTTPServer):
    """A chat server that answers by `script`; `seen` has key and prompt of each request, `bodies` its JSON."""

    def __init__(self, script: Script, port: int) -> None:
        super().__init__(("127.0.0.1", port), Chat)
        self.seen: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.script, self.url = script, f"http://127.0.0.1:{self.server_port}/v1"


class Chat(http.server.BaseHTTPRequestHandler):
    """One request to a `Server`."""

    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[0]["text"]  # the rest is an image
        self.server.bodies.append(request)
        self.server.seen.append((self.headers["Authorization"], text))
        reply = self.server.script(text, len(self.server.seen))
        if reply == "hang":
            time.sleep(1.5)
        if isinstance(reply, int):
            self.send_response(reply)
            self.end_headers()
            return
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [
            {"index": 0, "finish_reason": "length" if reply.endswith(CUT_OFF) else "stop",
             "message": {"role": "assistant", "content": reply}}]})
        body = {"garbage": "<html>", "wrong": json.dumps({"choices": []})}.get(reply, body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(60 if reply == "drip" else 0):
                self.wfile.write(body[i:i + 1])
                time.sleep(0.1)
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def toy_helper(text: str, _: int = 0) -> str:
    """What an ideal helper replies about the toy, by rules: it grades and writes from the chart's true facts."""
    if text.startswith("Reply"):
        return "ready"
    facts, question, answer = (re.search(f"{name}: (.*)", text)[1] for name in ("the image", "Question", "Right answer"))
    values = {bar: int(value) for bar, value in (fact.split() for fact in facts.split(", "))}
    bars = [word for word in re.findall(r"\w+", question) if word in values] + ["", ""]
    kind = next(k for k in toy.QUESTIONS
                if toy.QUESTIONS[k][0].format(a=bars[0], b=bars[1]) == question)
    _, goal, _, bars, working = toy.ask(kind, values, *bars[:2])
    best = toy.trace(goal, bars, values, working, answer)
    if text.startswith("Write"):
        return f"{best}\nAnswer: {answer}"
    graded = text.split(re.search(r"two lines (\[\w+\])", text)[1] + "\n")[1].strip()
    grounded, quoted = thinking.groundedness(graded, facts, question)
    if not quoted or grounded < quoted:
        return "low"
    return "high" if graded == best else "medium"


def serve(script: Script, port: int = 0) -> Server:
    """Start a chat server on this machine; it answers from threads of its own."""
    server = Server(script, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(port: int) -> None:
    """Serve until the program is ended."""
    print(serve(toy_helper, port).url)
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]))
