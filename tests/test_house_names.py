"""Names: no folder hides an installed package, no public function is a module, importing subquad is light, values pickle."""

import importlib.metadata
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import subquad
from subquad.ir.contract import Contract
from subquad.ir.errors import PlanError, SubquadError
from subquad.ir.plan import Plan, Step
from subquad.ir.refusal import Refusal
from subquad.ir.report import Report

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_FUNCTIONS = {"list_passes", "inspect", "rewrite", "verify", "convert", "save", "load", "restore", "demo_weights"}
FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else None
    def __enter__(self): return self
    def __exit__(self, *args): return None
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_this_run_does_not_see_the_repository_root() -> None:
    assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}


def test_no_folder_is_imported_under_its_bare_name() -> None:
    code = (
        "import sys, subquad, subquad.codegen, subquad.passes, subquad.cli.__main__\n"
        "bare = [m for m in sys.modules if m.split('.')[0] in ('passes', 'kernels', 'cli', 'codegen', 'rewriter')]\n"
        "assert not bare, bare"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fake_kernels(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path


def test_transformers_finds_the_real_kernels_from_the_repository_root(fake_kernels: Path) -> None:
    code = (
        "import transformers.utils.import_utils as u; assert u.is_kernels_available()\n"
        "from transformers import LlamaForCausalLM\n"
        "import kernels, sys; assert 'FAKE' not in dir(); print(kernels.__file__)"
    )
    done = python("-c", code, PYTHONPATH=str(fake_kernels))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(fake_kernels / "kernels" / "__init__.py")


def test_transformers_takes_this_folder_for_no_package_where_the_real_kernels_is_not_installed() -> None:
    if any(d.name == "kernels" for d in importlib.metadata.distributions()):
        pytest.skip("PyPI's kernels is installed here")
    code = (
        "import transformers.utils.import_utils as u; assert not u.is_kernels_available()\n"
        "from transformers import LlamaForCausalLM\n"
        "import kernels; assert not hasattr(kernels, '__file__') and not hasattr(kernels, 'softmax_attention')"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("start", [("-m", "subquad.cli"), ("-c", "from subquad.cli.__main__ import main; main()")])
def test_the_command_line_starts_from_the_repository_root(start: tuple[str, str]) -> None:
    done = python(*start, "--version")
    assert done.returncode == 0, done.stderr
    assert subquad.__version__ in done.stdout


def test_python_m_drops_the_root_before_anything_is_imported(fake_kernels: Path) -> None:
    done = python("-m", "subquad.cli", "env", "--json", PYTHONPATH=str(fake_kernels))
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in json.loads(done.stdout)["path"]


def test_no_module_bears_the_name_of_a_public_function() -> None:
    functions = {name for name in subquad.__all__ if name.islower() and not name.startswith("_")}
    assert functions == PUBLIC_FUNCTIONS
    modules = {path.stem for path in (ROOT / "rewriter").iterdir()} | {"passes", "kernels", "codegen", "cli"}
    assert not functions & modules


def test_every_public_name_loads() -> None:
    for name in subquad.__all__:
        assert getattr(subquad, name) is not None
    assert set(subquad.__all__) <= set(dir(subquad))
    with pytest.raises(AttributeError, match="no attribute 'linearise'"):
        _ = subquad.linearise


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import subquad\n"
        "new = set(sys.modules) - before; print('\\n'.join(sorted(new)))\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    new = set(done.stdout.split())
    heavy = {
        "transformers",
        "click",
        "rich",
        "triton",
        "networkx",
        "tokenizers",
        "safetensors",
        "peft",
        "jinja2",
        "gguf",
    }
    assert not {m for m in new if m.split(".")[0] in heavy}
    ours = {m for m in new if m.startswith("subquad")}
    assert {m for m in ours if not m.startswith(("subquad.kernels", "subquad.codegen", "subquad.ir"))} == {"subquad"}


VALUES = [
    Refusal("model.layers.0", "softmax", "no value product follows.", "model.py:3"),
    Plan((Step("model.layers.0", "fuse:attention", (("window", 64),)),), "abc"),
    Contract.EXACT,
    Report(refusals=[Refusal("", "attention", "there is none.")]),
    PlanError("the plan is torn."),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_public_values_pickle_under_their_public_module(value: object) -> None:
    assert type(value).__module__.startswith("subquad.")
    back = pickle.loads(pickle.dumps(value))
    assert type(back) is type(value)
    assert (str(back) == str(value)) if isinstance(value, SubquadError) else (back == value)
