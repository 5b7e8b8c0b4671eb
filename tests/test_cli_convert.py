"""`subquad convert` through a subprocess: Ctrl-C keeps the state, says so in one sentence, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import subquad
from subquad.model_source import open_model

PASS = "linearize:lolcats(window=8, sinks=2)"
SLOWED = """
import pathlib, time
from subquad.training import stages
work = stages.AdapterTraining.work
def slowed(self, number):
    losses = work(self, number)
    if number == 1:
        pathlib.Path("started").touch()
        time.sleep(1.5)
    return losses
stages.AdapterTraining.work = slowed
"""


@pytest.fixture
def linearized(tiny_llama: Path, tmp_path: Path) -> Path:
    """A saved tiny Llama with untrained feature maps, a text beside it."""
    fast = subquad.rewrite(open_model(str(tiny_llama), dtype="fp32").module, passes=PASS, verify=False)
    subquad.save(fast, tmp_path / "linear")
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} makes {n * n}.\n" for n in range(1500)))
    return tmp_path / "linear"


def start(linearized: Path, target: str, *, slowed: bool) -> subprocess.Popen[str]:
    patched = linearized.parent / "patched"
    patched.mkdir(exist_ok=True)
    (patched / "sitecustomize.py").write_text(SLOWED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if slowed:
        environment["PYTHONPATH"] = str(patched)
    command = ["convert", str(linearized), "--text", "text.txt", "--tokens", "9216", "-o", target]
    return subprocess.Popen(
        [sys.executable, "-m", "subquad.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=linearized.parent, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background inherits an ignored one
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_and_the_same_command_goes_on_to_the_same_model(linearized: Path) -> None:
    here = linearized.parent
    interrupted = start(linearized, "trained", slowed=True)
    deadline = time.monotonic() + 200
    while not (here / "started").exists() and interrupted.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGINT)
    out, error = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, error
    assert out == ""
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith("subquad: interrupted after batch 2 of ")
    assert sentence.endswith("the same command goes on from trained.unfinished.")
    assert "Traceback" not in error
    assert not (here / "trained").exists()
    assert list((here / "trained.unfinished").iterdir())

    resumed = start(linearized, "trained", slowed=False)
    out, error = resumed.communicate(timeout=250)
    assert resumed.returncode == 0, error
    assert "adapters" in out
    assert not (here / "trained.unfinished").exists()
    whole = start(linearized, "whole", slowed=False)
    assert whole.wait(timeout=250) == 0
    whole.communicate()
    one, other = (load_file(here / name / "model.safetensors") for name in ("trained", "whole"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]), name
