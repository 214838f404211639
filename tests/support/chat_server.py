"""A local server that speaks the chat completions protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class ChatServer:
    """Answers with `answers` in turn, the last one for ever, or with what `reply` makes of the user message; keeps what
    it was asked. A context manager."""

    def __init__(self, reply: Callable[[str], str] | None = None):
        self.asked, self.headers, self.paths, self.running, self.most = [], [], [], 0, 0
        self.answers, self.delay, self.lock = [completion("Score: 7")], 0.0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    answer = server.answers[min(len(server.asked), len(server.answers) - 1)]
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    server.running += 1
                    server.most = max(server.most, server.running)
                if reply:
                    answer = completion(reply(body["messages"][-1]["content"]))
                time.sleep(server.delay)
                with server.lock:
                    server.running -= 1
                status, text, *headers = answer
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client may hang up: no traceback in another test's output
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
