"""A scripted helper that knows the toy's true facts, to try Full DyME without a language model.

    python -m support.toy_helper 8000 &
    python dyme.py --helper-url http://127.0.0.1:8000/v1 --helper-model toy --out runs/full
"""

import http.server
import json
import re
import sys
from typing import Any

from support import thinking, toy


class Chat(http.server.BaseHTTPRequestHandler):
    """A connection to a chat server that answers by `toy_helper`."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True  # connections are kept

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": toy_helper(request["messages"][-1]["content"])}
        reply = json.dumps({"choices": [{"finish_reason": "stop", "message": message}]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def toy_helper(text: str) -> str:
    """What an ideal helper says about the toy: it grades and writes by the chart's true facts."""
    (facts, question, answer), = re.findall(
        r"the image: (.*)\nQuestion: (.*)\nRight answer: (.*)", text)
    values = {bar: int(value) for bar, value in re.findall(r"(\w+) (\d+)", facts)}
    bars = [word for word in re.findall(r"\w+", question) if word in values] + ["", ""]
    kind = next(kind for kind, (asked, *_) in toy.QUESTIONS.items()
                if asked.format(a=bars[0], b=bars[1]) == question)
    _, goal, _, bars, working = toy.ask(kind, values, *bars[:2])
    best = toy.trace(goal, bars, values, working, answer)
    if text.startswith("Write"):
        return f"{best}\nAnswer: {answer}"
    graded = re.split(r"\n\[\w+\]\n", text)[1].strip()  # between the lines of the fence
    grounded, quoted = thinking.groundedness(graded, facts, question)
    return "high" if graded == best else "medium" if 0 < grounded == quoted else "low"


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Chat)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
