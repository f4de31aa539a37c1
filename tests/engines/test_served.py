"""vLLM served over HTTP, on loopback: who asks is watched, who does not is left alone. ``make engines``."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from engines.fresh import BAD, CLEAN, NEEDS_VLLM
from qwen_precision.judge import judge
from qwen_precision.record import load
from support.checkpoints import DEMO, ROOT

pytestmark = NEEDS_VLLM

NAME = "qwen_precision.vllm.logits:WatchLogits"
EXTENSION = "qwen_precision.vllm.WorkerExtension"
SERVE = "--dtype float16 --enforce-eager --max-model-len 64 --max-num-seqs 4 --host 127.0.0.1 --no-enable-log-requests"


class Server:
    """A running one."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer; raises an HTTPError where the request is refused."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def ask(self, prompt: str, **xargs: str) -> str:
        """The greedy text."""
        body: dict[str, Any] = {"model": str(DEMO), "prompt": prompt, "max_tokens": 6, "temperature": 0}
        answer = self.post("/v1/completions", {**body, **({"vllm_xargs": xargs} if xargs else {})})
        return str(answer["choices"][0]["text"])

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(600):
            assert process.poll() is None, self.log.read_text(encoding="utf-8")[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text(encoding="utf-8")[-3000:])


@contextmanager
def serving(folder: Path, *options: str, path: str = "") -> Iterator[Server]:
    """A fresh server, ended with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    places = os.pathsep.join(filter(None, [path, str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": places, "QPREC_TRIPS": str(folder / "trips.json")}
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO), *SERVE.split()]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            server = Server(port, folder / "server.log")
            server.wait(process)
            yield server
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(30)


def failed(folder: Path) -> list[str]:
    """Texts of the requests in the trip file."""
    path = folder / "trips.json"
    return [row.text for row in load(path).prompts[0].rows] if path.exists() else []


def test_named_it_keeps_who_asks_and_leaves_alone_who_does_not(tmp_path: Path) -> None:
    with serving(tmp_path, "--logits-processors", NAME, "--worker-extension-cls", EXTENSION) as server:
        with ThreadPoolExecutor() as pool:  # beside each other, in one batch
            asked = [pool.submit(server.ask, CLEAN, **each) for each in ({"qprec": "watch"}, {"qprec": "guard"}, {})]
            assert len({each.result() for each in asked}) == 1 and set(asked[0].result()) != {"!"}
        assert server.ask(BAD) == "!!!!!!" and failed(tmp_path) == [], "nobody asked"
        assert server.ask(BAD, qprec="guard") == "!!!!!!" and failed(tmp_path) == [BAD], "a wholly bad row shows"
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            server.ask(CLEAN, qprec="everything")
        assert "expected 'watch' or 'guard'" in refused.value.read().decode()
        server.post("/collective_rpc", {"method": "qprec_start"})
        assert server.ask(BAD) == "!!!!!!"
        server.post("/collective_rpc", {"method": "qprec_stop", "args": [str(tmp_path / "run.json")]})
    first = next(each for each in judge(load(tmp_path / "run.json")).findings if each.origin)
    assert first.place.module == "model.layers.3.mlp.down_proj"
    assert judge(load(tmp_path / "trips.json")).verdict == {"fp16": "fail"}


def test_installed_it_loads_by_itself_and_acts_for_who_asks_alone(tmp_path: Path) -> None:
    site = tmp_path / "site"  # what pip would have written beside the package
    (site / "qprec-0.dist-info").mkdir(parents=True)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in row.items()) for group, row in points.items()
    ]
    (site / "qprec-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: qprec\nVersion: 0\n")
    (site / "qprec-0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    with serving(tmp_path, path=str(site)) as server:
        assert server.ask(BAD) == "!!!!!!" and failed(tmp_path) == []
        assert server.ask(BAD, qprec="watch") == "!!!!!!" and failed(tmp_path) == [BAD]
    shutil.rmtree(site)
