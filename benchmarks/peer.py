"""A competitor that needs packages of its own: a Python process that keeps its inputs and computes on command.

The peer's functions stand in a script that only its own interpreter imports::

    # peers.py
    def gram(data, power=1.0):              # data: the arrays that were sent, by name
        return (data["x"] @ data["x"].T) ** power      # an array, or a dict of arrays; computed when it returns

    # the benchmark
    peer = Peer.find("DYNAKERN_PEER_NT", "neural-tangents", Path(__file__).with_name("peers.py"))
    if peer is not None:                    # None: the variable is not set, and a line on stderr said so
        peer.send(x=x)
        peer.call("gram", power=2.0)        # blocks until it is computed; this is what one times
        K = peer.result()                   # fetches the numbers of the last call

A call costs one line through a pipe each way, about 0.05 ms. Functions must wait for asynchronous work themselves
(``block_until_ready``). The server side is this file too: it needs NumPy alone.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """A running peer.

    Args:
        python: The interpreter that has the peer's packages.
        script: File whose functions are called.
        threads: Threads of the peer (``OMP_NUM_THREADS`` and its kin); with 1 it is bound to one core as well.
        environment: More environment variables.

    Raises:
        RuntimeError: The peer did not start, or (from the methods) a command failed there; its message is quoted.
    """

    def __init__(self, python: str, script: Path, *, threads: int = 1, environment: dict[str, str] | None = None):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        variables = {**os.environ, **dict.fromkeys(names, str(threads)), **(environment or {})}
        variables.pop("PYTHONPATH", None)
        bound = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if threads == 1 and _has_taskset() else []
        self._folder = tempfile.TemporaryDirectory(prefix="dynakern-peer-")
        self._process = subprocess.Popen(
            [*bound, python, str(Path(__file__).resolve()), str(Path(script).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables,
            text=True,
        )
        atexit.register(self.close)
        self._answer()

    @classmethod
    def find(cls, variable: str, package: str, script: Path, **options: Any) -> Peer | None:
        """Start the peer whose interpreter the environment variable names; without it say so and return None."""
        python = os.environ.get(variable)
        if not python:
            print(
                f"skipped: the peer {package} lives in an environment of its own; set {variable} to its Python.",
                file=sys.stderr,
            )
            return None
        return cls(python, script, **options)

    def send(self, **arrays: Any) -> None:
        """Store arrays in the peer, under their names, for all later calls."""
        path = Path(self._folder.name) / "inputs.npz"
        np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
        self._do(do="load", path=str(path))

    def call(self, name: str, **options: Any) -> None:
        """Run a function of the script on the stored arrays, with options that JSON can carry; wait for its end."""
        self._do(do="call", name=name, options=options)

    def result(self) -> Any:
        """Return what the last call computed: an array, or a dict of arrays."""
        path = Path(self._folder.name) / "result.npz"
        self._do(do="result", path=str(path))
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        return found.pop("result") if set(found) == {"result"} else found

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None and self._process.stdin:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._folder.cleanup()

    def _do(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The peer ended with code {self._process.wait()}; its output is above.")
        error = json.loads(line)["error"]
        if error:
            raise RuntimeError(f"In the peer: {error}")


def _has_taskset() -> bool:
    import shutil

    return shutil.which("taskset") is not None and hasattr(os, "sched_getaffinity")


def _serve(script: str) -> None:
    """Answer commands from standard input until it ends; the peer's own prints go to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(error: str = "") -> None:
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()

    spec = importlib.util.spec_from_file_location("peer_script", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer()
    data: dict[str, Any] = {}
    found: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                with np.load(command["path"]) as file:
                    data.update({name: file[name] for name in file.files})
            elif command["do"] == "call":
                found = getattr(module, command["name"])(data, **command["options"])
            else:
                arrays = found if isinstance(found, dict) else {"result": found}
                np.savez(command["path"], **{name: np.asarray(array) for name, array in arrays.items()})
        except Exception as error:  # whatever fails is told to the benchmark, which raises it
            answer(f"{type(error).__name__}: {error}")
        else:
            answer()


if __name__ == "__main__":
    _serve(sys.argv[1])
