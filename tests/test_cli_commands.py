"""The command line through real subprocesses: each command, --json, exit statuses, pipes and Ctrl-C."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROUTER = """
import torch
from torch import nn

class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        weights, chosen = torch.softmax(self.gate(x), dim=-1).topk(2)
        y = torch.einsum("btd,edf->btef", x, self.experts)
        picked = torch.gather(y, 2, chosen[..., None].expand(*chosen.shape, 8))
        return (weights[..., None] * picked).sum(2)

def router():
    return Router().eval(), (torch.randn(2, 5, 8),)

def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(2, 5, 8),)

def uncapturable():
    class Leaving(nn.Module):
        def forward(self, x):
            return x + torch.from_numpy(x.numpy())
    return Leaving(), (torch.randn(2, 5, 8),)
"""


def subquad(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "subquad.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=240,
    )


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, for the many ways of being wrong."""
    from subquad.cli.ending import run

    capsys.readouterr()
    try:
        status = run([str(a) for a in arguments])
    finally:
        logging.disable(logging.NOTSET)
    out, error = capsys.readouterr()
    return subprocess.CompletedProcess([], status, out, error)


def one_sentence(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    assert done.returncode == status, (done.returncode, done.stderr[-1500:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("subquad: ")
    return lines[0]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(ROUTER)
    return path


def test_inspect(tiny_llama: Path) -> None:
    done = subquad("inspect", tiny_llama, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert [site["path"] for site in report["sites"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert set(report["sites"][0]) >= {
        "path",
        "origin",
        "phase",
        "mask",
        "scale",
        "heads",
        "kv_heads",
        "head_dim",
        "evidence",
    }
    assert set(report) >= {"sites", "loops", "prefixes", "refusals"}
    assert (report["sites"][0]["heads"], report["sites"][0]["kv_heads"]) == (4, 2)
    shown = subquad("inspect", tiny_llama, "--attention", "eager", "--evidence")
    assert shown.returncode == 0, shown.stderr
    assert "model.layers.0-1.self_attn" in shown.stdout
    assert "causal" in shown.stdout
    assert "\x1b[" not in shown.stdout


def test_inspect_refuses_a_router_with_status_3(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = here(capsys, "inspect", f"{own}:router", "--trust", "--json")
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert report["sites"] == []
    (refusal,) = report["refusals"]
    assert set(refusal) == {"path", "what", "reason", "source", "code", "kind", "advice"}
    assert refusal["source"].startswith(str(own))


def test_inspect_of_a_model_without_attention(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no attention" in one_sentence(here(capsys, "inspect", f"{own}:mlp", "--trust"))


def test_a_forward_that_cannot_be_captured_names_its_line(own: Path) -> None:
    line = next(n for n, text in enumerate(ROUTER.splitlines(), 1) if ".numpy()" in text)
    assert f"own.py:{line}" in one_sentence(subquad("inspect", f"{own}:uncapturable", "--trust"))


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    done = subquad("passes", "--json")
    assert done.returncode == 0, done.stderr
    passes = {entry["name"]: entry for entry in json.loads(done.stdout)["passes"]}
    assert passes["fuse"]["contract"] == "exact"
    assert set(passes["fuse"]) == {"name", "contract", "matches", "knobs", "paper"}
    table = here(capsys, "passes", "linearize")
    assert "window" in table.stdout
    assert "did you mean 'fuse'?" in one_sentence(here(capsys, "passes", "fuze"))


def test_rewrite_verify_and_the_artifact(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done = subquad("rewrite", tiny_llama, "-p", "fuse", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [entry["path"] for entry in report["applied"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(measured["passed"] for measured in report["verification"])
    assert report["rolled_back"] == []
    again = tmp_path / "again"
    planned = here(capsys, "rewrite", tiny_llama, "--plan", out, "-o", again, "--json", "--no-verify")
    assert json.loads(planned.stdout)["plan_hash"] == report["plan_hash"]
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    verified = subquad("verify", tiny_llama, out, "--json")
    assert verified.returncode == 0, verified.stderr
    assert {m["rung"] for m in json.loads(verified.stdout)["verification"]} >= {"site", "logits", "tokens"}
    assert "--overwrite" in one_sentence(here(capsys, "rewrite", tiny_llama, "-o", out))
    table = here(capsys, "rewrite", tiny_llama, "-o", out, "--overwrite", "--where", "model.layers.1*", "--no-verify")
    assert table.returncode == 0, table.stderr
    assert "model.layers.1.self_attn" in table.stdout
    program = tmp_path / "model.pt2"
    done = here(capsys, "rewrite", tiny_llama, "-o", program, "--no-verify", "--json")
    assert done.returncode == 0, done.stderr
    assert "--trust" in one_sentence(here(capsys, "inspect", program))


@pytest.fixture(scope="module")
def exact(tiny_llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama rewritten exactly and saved."""
    import subquad as package
    from subquad.model_source import open_model

    out = tmp_path_factory.mktemp("exact") / "out"
    return package.save(package.rewrite(open_model(str(tiny_llama_source)).module, verify=False), out)


def test_generate(exact: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "hello", "--max-new-tokens", "8", "--json")
    done = subquad("generate", exact, *options, "--no-compile")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) >= {"text", "tokens", "tokens_per_second", "mean_accepted"}
    assert answer["engine"] == "subquad"
    theirs = json.loads(here(capsys, "generate", tiny_llama, *options).stdout)
    assert theirs["engine"] == "transformers"
    assert answer["tokens"] == theirs["tokens"]
    sampled = [
        here(capsys, "generate", exact, *options, "--no-compile", "--temperature", "1", "--seed", seed)
        for seed in (1, 1, 2)
    ]
    first, second, third = (json.loads(s.stdout)["tokens"] for s in sampled)
    assert first == second
    assert first != third
    streamed = here(capsys, "generate", exact, *options[:-1], "--no-compile")
    assert streamed.stdout == answer["text"] + "\n"
    assert "tokens/s" in streamed.stderr


def test_generating_from_an_artifact_needs_no_transformers(exact: Path) -> None:
    code = (
        "import sys; from subquad.cli.ending import run\n"
        f"status = run(['generate', {str(exact)!r}, '--prompt', 'hi', '--max-new-tokens', '3', '--no-compile', '--json'])\n"
        "assert status == 0\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]


def test_emit(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    done = subquad("emit", exact, "-d", tmp_path / "k", "--target", "cuda:90", "--json")
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    assert {kernel["part"] for kernel in kernels} == {"forward", "merge", "grad_queries", "grad_keys"}
    for kernel in kernels:
        assert kernel["sites"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        built = kernel["build"]
        assert (tmp_path / "k" / built["binary"]).stat().st_size > 0
        assert built["shared_bytes"] <= built["limit_bytes"]
        assert "@triton.jit" in (tmp_path / "k" / kernel["source"]).read_text()
    assert "did you mean 'cuda:90'?" in one_sentence(
        here(capsys, "emit", exact, "-d", tmp_path / "j", "--target", "cuda:91")
    )
    assert "exists" in one_sentence(here(capsys, "emit", exact, "-d", tmp_path / "k"))
    assert not (tmp_path / "j").exists()


def test_convert_mistakes(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trained"
    one_sentence(here(capsys, "convert", exact, "--text", tmp_path / "gone.txt", "--tokens", "5000", "-o", out))
    (tmp_path / "t.txt").write_text("word " * 9000)
    one_sentence(here(capsys, "convert", exact, "--text", tmp_path / "t.txt", "--tokens", "20000", "-o", out))
    assert not out.exists()


@pytest.mark.slow
def test_bench_demo_and_compiled_generation(exact: Path, tiny_llama: Path) -> None:
    done = subquad("bench", tiny_llama, exact, "--pairs", "1", "--new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    comparison = json.loads(done.stdout)
    assert [figure["what"] for figure in comparison["figures"]] == ["decode", "time to first token"]
    assert set(comparison) >= {"text", "tokens", "tokens_per_second", "mean_accepted", "machine"}
    shown = subquad("demo", "--model", tiny_llama, "--new-tokens", "4", "--json")
    assert shown.returncode == 0, shown.stderr
    stages = {stage["name"]: stage for stage in json.loads(shown.stdout)["stages"]}
    assert list(stages) == ["open", "inspect", "original", "rewrite", "verify", "generate", "artifact", "linearize"]
    assert stages["generate"]["facts"]["identical tokens"] is True
    assert stages["artifact"]["facts"]["same answer after loading"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "fuze"), "did you mean 'fuse'?"),
        (("-p", "linearize:lolcats,windw=3"), "did you mean 'window'?"),
        (("-p", "linearize:lolcats(window=3"), "parenthesis"),
        (("--where", "decoder.*"), "matches no attention site"),
        (("--plan", "gone.json"), "does not exist"),
        (("--dtype", "int3"), "dtype 'int3' is unknown"),
    ],
)
def test_mistakes_write_nothing(
    tiny_llama: Path, tmp_path: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in one_sentence(here(capsys, "rewrite", tiny_llama, *arguments, "-o", tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-llama"]


def test_plan_of_another_model(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.toml").write_text('format = 1\nmodel = "0123456789abcdef"\nsteps = []\n')
    done = here(capsys, "rewrite", tiny_llama, "--plan", tmp_path / "plan.toml", "-o", tmp_path / "out")
    assert "made for another model" in one_sentence(done)


def test_usage_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'inspect'?" in one_sentence(subquad("inspct", "x"))
    assert "MODEL" in one_sentence(here(capsys, "inspect"))
    assert "does not exist" in one_sentence(here(capsys, "inspect", "no/such/directory/here"))
    assert "--directory" in one_sentence(here(capsys, "emit", "x"))


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    top = here(capsys, "--help")
    assert top.returncode == 0
    commands = [line.split()[0] for line in top.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert commands == [
        "inspect",
        "passes",
        "rewrite",
        "convert",
        "verify",
        "generate",
        "bench",
        "emit",
        "demo",
        "cache",
        "env",
    ]
    for command in commands:
        assert "--json" in here(capsys, command, "--help").stdout, command


def test_cache_and_env(tmp_path: Path) -> None:
    (tmp_path / "subquad" / "triton").mkdir(parents=True)
    (tmp_path / "subquad" / "triton" / "k.py").write_text("x = 1")
    done = subquad("cache", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert json.loads(done.stdout)["entries"] == [{"name": "triton", "files": 1, "bytes": 5}]
    assert "no entry 'tritn'" in one_sentence(subquad("cache", "--clear", "tritn", XDG_CACHE_HOME=str(tmp_path)))
    cleared = subquad("cache", "--clear", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert json.loads(cleared.stdout)["freed"] == 5
    assert list((tmp_path / "subquad").iterdir()) == []
    assert {"subquad", "torch", "python", "cores"} <= set(json.loads(subquad("env", "--json").stdout))


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "subquad.cli", "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_ctrl_c_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import pathlib, time\ndef make():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "subquad.cli", "rewrite", f"{slow}:make", "--trust", "-o", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests run in the background inherit an ignored one
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert error == "subquad: interrupted; nothing half-written is left behind.\n"
    assert not (tmp_path / "out").exists()


def test_a_defect_is_one_sentence_too(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import subquad.model_source as m\ndef broken(*a, **k):\n    raise ZeroDivisionError('half a\\nthought')\nm.open_model = broken\n"
    )
    done = subquad("inspect", tiny_llama, PYTHONPATH=str(tmp_path))
    assert "this is a defect of subquad (ZeroDivisionError: half a)" in one_sentence(done, 1)
    assert "Traceback" in subquad("inspect", tiny_llama, PYTHONPATH=str(tmp_path), SUBQUAD_TRACEBACK="1").stderr
