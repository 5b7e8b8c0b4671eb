"""What the documents say exists does exist, and the quick examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/results.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_and_links_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []
    named = re.findall(r"`((?:rewriter|passes|kernels|codegen|cli|tests|benchmarks|examples|docs)/[\w./]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    scripts = re.findall(r"`(bench_\w+\.py)`", text)
    assert [name for name in scripts if not (ROOT / "benchmarks" / name).exists()] == []


def test_commands_in_the_readme_exist() -> None:
    from subquad.cli.root import COMMANDS

    used = set(re.findall(r"^subquad (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert used <= set(COMMANDS)
    assert {"inspect", "rewrite", "verify", "generate", "bench", "emit", "convert"} <= used


@pytest.mark.parametrize("example", ["own_model.py", "compile_backend.py"])
def test_quick_examples_run(example: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "examples" / example)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert re.search(r"1 site rewritten|'fuse', 'fuse'", done.stdout), done.stdout
    assert re.search(r"difference.* \d\.\de-0[4-9]|difference.* 0\.0e\+00", done.stdout), done.stdout


@pytest.mark.slow
def test_the_long_example_runs() -> None:
    pytest.importorskip("transformers")
    path = ROOT / "examples" / "rewrite_and_generate.py"
    done = subprocess.run([sys.executable, "-P", str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "30 sites rewritten" in done.stdout
