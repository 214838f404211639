"""A headless Chromium by its own DevTools protocol, over pipes: no driver, no port, nothing to install beside it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
KEYS = {"Tab": 9, "ArrowDown": 40, "ArrowUp": 38, "Enter": 13, " ": 32}
PATIENCE = 120.0  # seconds for one answer: machines are busy


def find_chromium() -> str | None:
    """The browser named by VOLD_CHROMIUM, else the first one on the path."""
    return os.environ.get("VOLD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of a browser of its own. `requested`: every address it asked for."""

    def __init__(self, executable: str, profile: Path, *, width: int = 1120, height: int = 800):
        read, self._write = _pipe()
        self._read, write = _pipe()
        # the protocol's pipes are the file descriptors 3 and 4 of the browser
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "browser"]
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([*shell, *command], pass_fds=(read, write), start_new_session=True, **quiet)
        os.close(read), os.close(write)
        self._number, self._buffer, self._session = 0, b"", None
        self._events: list[dict[str, Any]] = []
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise AssertionError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": {" ": " ", "Enter": "\r"}[key]} if key in (" ", "Enter") else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, selector: str | None = None) -> bytes:
        """PNG of what `selector` finds first, a little room around it, or of the window."""
        clip = {}
        if selector:
            box = self.js(
                f"(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])"
                f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
            )
            x, y, width, height = box
            clip = {"clip": {"x": max(x - 16, 0), "y": y - 12, "width": width + 32, "height": height + 24, "scale": 1}}
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=bool(selector), **clip)
        return base64.b64decode(result["data"])

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read), os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda received: received.get("id") == message["id"])
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def _wait(self, matches) -> dict[str, Any]:
        for index, message in enumerate(self._events):
            if matches(message):
                return self._events.pop(index)
        while not matches(message := self._receive()):
            self._events.append(message)
        return message

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise AssertionError("the browser " + ("ended" if ready else f"gave no answer in {PATIENCE:.0f} s"))
            self._buffer += part
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(raw)
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        return message


def _pipe() -> tuple[int, int]:
    """Two ends above the numbers that the browser wants for its own."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high
