"""`vold serve` processes for tests: started together, killed one by one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

PATIENCE = 600.0  # seconds an engine may take to start


class Engine:
    """One engine on a free port of this machine; `start` again after `kill` gives one with the checkpoint's weights."""

    def __init__(self, checkpoint: Path, log: Path, *, adapter=None, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._checkpoint, self._log, self._settings, self._adapter = checkpoint, log, settings, adapter
        self.secret_file = log.parent / "engines.secret"
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        from vold.commands.serve import server_command, server_environment
        from vold.config.schema import VllmConfig

        settings = {"kv_cache_gib": 0.25, "max_model_len": 256, "enforce_eager": True, "transport": "nccl"}
        settings = VllmConfig(**settings | self._settings)
        where = {"host": "127.0.0.1", "port": self._port}
        command = server_command(self._checkpoint, settings, dtype="float32", where=where, adapter=self._adapter)
        guard = server_environment(self._checkpoint, settings, self.secret_file, where, adapters=bool(self._adapter))
        environment = {**os.environ, **guard, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # A session of its own, so that its worker dies with it.
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log.open("a"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5.0):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the engine did not start: {self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
