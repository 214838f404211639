"""A scan of every source file's syntax tree for code from data, shells, unpickling, remote code and open ports."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from vold import cli

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("vold", "kernels", "benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent != Path(__file__).parent
)
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNSAFE_YAML = {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.full_load_all"}
# The evaluated text is the test's own: a README's example, a sum of the miniature; the option is one that is refused.
ALLOWED = {
    ("tests/kernels/test_linear_policy_loss.py", "exec"),
    ("tests/miniature/test_miniature_world.py", "eval"),
    ("tests/docs/test_newcomer.py", "::"),  # of a test's name
    ("tests/models/test_served.py", "trust_remote_code"),
}


def violations(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if (node.module or "").split(".")[0] in PICKLES else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} & {"0.0.0.0", "::", "--trust-remote-code", "trust_remote_code"}
        elif isinstance(node, ast.Call):
            names |= _call_violations(node)
    return names


def _call_violations(node: ast.Call) -> set[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    refused = {name} & (BUILTINS | SHELLS | UNSAFE_YAML)
    for keyword in ("shell", "trust_remote_code", "allow_pickle"):
        if keyword in keywords and not _is(keywords[keyword], False):
            refused.add(f"{keyword}={ast.unparse(keywords[keyword])}")
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        refused.add("torch.load without weights_only=True")
    return refused


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_dangerous_code(path):
    name = str(path.relative_to(ROOT))
    assert {use for use in violations(ast.parse(path.read_text())) if (name, use) not in ALLOWED} == set()


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "exec(x)",
        "import pickle",
        "from dill import loads",
        "os.system(x)",
        "run(x, shell=True)",
        "run(x, shell=y)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "options = {'trust_remote_code': y}",
        "serve(host='0.0.0.0')",
    ],
)
def test_the_scan_detects(code):
    assert violations(ast.parse(code))


def test_the_scan_covers_every_package():
    assert {path.parts[len(ROOT.parts)] for path in SOURCES} == {"vold", "kernels", "benchmarks", "examples", "tests"}


def test_servers_listen_on_loopback_by_default():
    assert inspect.signature(cli.serve).parameters["host"].default == "127.0.0.1"
