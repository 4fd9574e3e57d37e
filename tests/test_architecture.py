"""The architecture, read from the sources: which file may import which, who may touch Pyro's insides, and sizes.

A rule is a function from one source file to its offences; each is also shown a file that breaks it.
"""

import ast
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent

# In the order in which data flows: a file imports only from files to its left.
LAYERS = (
    "params store data importance effects gaussian energy tilt curvature posterior solvers inference evaluation "
    "outcome forgetters attribution forgetting export page cli"
).split()
# Folders of the checkout that the library must not need; `pyro_forget.models` is the folder models.
OUTSIDE = {"pyro_forget.models", "pyro_forget.guides", "models", "guides", "experiments", "benchmarks", "tests"}

PYRO_INSIDES = {"poutine", "params", "param", "get_param_store", "clear_param_store", "module"}
# Who may import which part of Pyro's insides, besides effects/.
ALLOWED_INSIDES = {
    # A sampling effect is a messenger of its own, which users wrap their models in.
    "guides": ("pyro.poutine.messenger", "pyro.poutine.runtime"),
}
# Who may loop over batches: everyone else says data.reduce(fn) or data.gather(fn).
MAY_LOOP = {"data", "inference", "solvers"}

MAX_FUNCTION, MAX_MEDIAN, MAX_FILE = 40, 10, 300

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file, by its path from the root of the checkout."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        return Path(self.path).with_suffix("").parts

    @property
    def in_library(self) -> bool:
        return self.parts[0] == "pyro_forget"

    @property
    def room(self) -> str:
        """The layer of a library file ("" for pyro_forget/__init__), the top-level folder of any other."""
        if not self.in_library:
            return self.parts[0]
        return "" if self.parts[1] == "__init__" else self.parts[1]

    @property
    def module(self) -> str:
        parts = self.parts if self.in_library else ("pyro_forget", *self.parts)
        return ".".join(parts).removesuffix(".__init__")

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """What is imported, absolutely and with the name after `import`: (line, "pyro.poutine.trace")."""
        return list(self._imports())

    def _imports(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = self._start(node)
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)

    def _start(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path.endswith("__init__.py")
        package = self.module.split(".")[: None if is_package else -1]
        above = package[: len(package) - node.level + 1]
        return ".".join([*above, *([node.module] if node.module else [])])


def within(name: str, folders: set[str] | tuple[str, ...]) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def layers(source: Source) -> Iterator[str]:
    """A library file imports only from layers to its left, or from its own folder."""
    if not source.in_library or not source.room:
        return
    if source.room not in LAYERS:
        yield f"{source.path}: {source.room} is in no layer; write it into LAYERS and the layout table"
        return
    left = LAYERS[: LAYERS.index(source.room) + 1]
    for line, name in source.imports:
        if not within(name, ("pyro_forget",)) or within(name, OUTSIDE):
            continue
        target = name.split(".")[1] if "." in name else ""
        if target not in left and not (source.room == "cli" and target == "__version__"):
            yield f"{source.path}:{line} imports {name}, which is not to the left of {source.room}"


def nothing_from_outside(source: Source) -> Iterator[str]:
    """The library needs neither models nor guides nor what is not installed; cli/ may, inside a function."""
    if not source.in_library:
        return
    lazy = {
        inner.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, Function)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }
    for line, name in source.imports:
        may = source.room == "cli" and line in lazy and within(name, {"pyro_forget.models", "pyro_forget.guides"})
        if within(name, OUTSIDE) and not may:
            yield f"{source.path}:{line} imports {name}, which lies outside the library"


def installed_names(source: Source) -> Iterator[str]:
    """models/ and guides/ are known by their installed names, and need nothing that is not installed."""
    if source.in_library:
        return
    for line, name in source.imports:
        if within(name, OUTSIDE - {"pyro_forget.models", "pyro_forget.guides"}):
            yield f"{source.path}:{line} imports {name}, which is not there when the package is installed"


def pyro_insides(source: Source) -> Iterator[str]:
    """Only effects/ touches pyro.poutine and the param store."""
    if source.room == "effects":
        return
    for line, name in [*source.imports, *dotted_names(source.tree)]:
        first, _, rest = name.partition(".")
        inside = first == "pyro" and rest.split(".")[0] in PYRO_INSIDES
        if inside and not within(name, ALLOWED_INSIDES.get(source.room, ())):
            yield f"{source.path}:{line} uses {name}: only effects/ may"


def dotted_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Attribute chains from a plain name, such as pyro.poutine.trace."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                chain, inner = [inner.attr, *chain], inner.value
            if isinstance(inner, ast.Name):
                yield node.lineno, ".".join([inner.id, *chain])


def one_forgetter_a_file(source: Source) -> Iterator[str]:
    """A forgetter never imports another: default.py composes."""
    if source.room != "forgetters" or source.parts[-1] in {"default", "__init__"}:
        return
    for line, name in source.imports:
        if within(name, forgetters() | {"pyro_forget.forgetters"}) and not within(name, helpers()):
            yield f"{source.path}:{line} imports {name}: only forgetters/default.py composes forgetters"


def one_loop_over_data(source: Source) -> Iterator[str]:
    """Every sum over data goes through data.reduce; a look at the first batch, next(data.batches()), is no loop."""
    if source.room in MAY_LOOP:
        return
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
    looks = {id(argument) for call in calls if called(call) == "next" for argument in call.args}
    for call in calls:
        if called(call) in {"batches", "minibatches"} and id(call) not in looks:
            yield f"{source.path}:{call.lineno} calls {called(call)}(): say data.reduce(fn) or data.gather(fn)"


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return ast.unparse(call.func).rpartition(".")[2]


def no_asserts(source: Source) -> Iterator[str]:
    """`python -O` drops an assert, and its message tells a user nothing."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert):
            yield f"{source.path}:{node.lineno} asserts: raise an error that says what to do"


def no_pickle(source: Source) -> Iterator[str]:
    """A file that is loaded never runs code."""
    for line, name in source.imports:
        if within(name, ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")):
            yield f"{source.path}:{line} imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if not any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords):
                yield f"{source.path}:{node.lineno} calls torch.load without weights_only=True"


def sizes(source: Source) -> Iterator[str]:
    """A file is one noun, a function one thought."""
    if (length := len(source.text.splitlines())) > MAX_FILE:
        yield f"{source.path} has {length} lines, more than {MAX_FILE}: make it a folder"
    for node in functions(source):
        if num_lines(node) > MAX_FUNCTION:
            yield f"{source.path}:{node.lineno} {node.name} has {num_lines(node)} lines, more than {MAX_FUNCTION}"


def functions(source: Source) -> Iterator[Function]:
    return (node for node in ast.walk(source.tree) if isinstance(node, Function))


def num_lines(node: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


@cache
def sources() -> tuple[Source, ...]:
    paths = sorted(path for folder in ("pyro_forget", "models", "guides") for path in (ROOT / folder).rglob("*.py"))
    return tuple(Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


@cache
def forgetters() -> set[str]:
    """The modules of forgetters/ that define a class with a method `edit`."""
    return {source.module for source in sources() if source.room == "forgetters" and defines_edit(source)}


@cache
def helpers() -> tuple[str, ...]:
    """The other modules of forgetters/, which forgetters share."""
    modules = {source.module for source in sources() if source.room == "forgetters"}
    return tuple(modules - forgetters() - {"pyro_forget.forgetters"})


def defines_edit(source: Source) -> bool:
    classes = (node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef))
    return any(isinstance(node, Function) and node.name == "edit" for cls in classes for node in cls.body)


RULES = [
    layers,
    nothing_from_outside,
    installed_names,
    pyro_insides,
    one_forgetter_a_file,
    one_loop_over_data,
    no_asserts,
    no_pickle,
    sizes,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Source], Iterator[str]]):
    offences = [offence for source in sources() for offence in rule(source)]
    assert not offences, "\n".join([rule.__doc__ or "", *offences])


def test_functions_are_short():
    lengths = [num_lines(node) for source in sources() for node in functions(source)]
    assert median(lengths) <= MAX_MEDIAN


def test_every_source_is_seen():
    assert "pyro_forget/store.py" in {source.path for source in sources()}
    assert {source.parts[0] for source in sources()} == {"pyro_forget", "models", "guides"}


def test_no_drawer():
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not [source.path for source in sources() if source.parts[-1] in drawers]


BROKEN = [
    (layers, "pyro_forget/energy.py", "from pyro_forget.posterior import Posterior"),
    (layers, "pyro_forget/energy.py", "import pyro_forget"),
    (layers, "pyro_forget/energy.py", "from pyro_forget import forget"),
    (layers, "pyro_forget/energy.py", "from . import posterior"),
    (layers, "pyro_forget/effects/plate.py", "from ..energy import Energy"),
    (layers, "pyro_forget/effects/plate.py", "def f():\n    from pyro_forget.energy import Energy"),
    (layers, "pyro_forget/drawer.py", "import torch"),
    (nothing_from_outside, "pyro_forget/energy.py", "from pyro_forget.models import MLP"),
    (nothing_from_outside, "pyro_forget/energy.py", "from pyro_forget import guides"),
    (nothing_from_outside, "pyro_forget/energy.py", "def f():\n    import pyro_forget.models"),
    (nothing_from_outside, "pyro_forget/cli/demo.py", "from pyro_forget.models import MLP"),
    (nothing_from_outside, "pyro_forget/cli/demo.py", "def f():\n    from experiments import front"),
    (installed_names, "models/mlp.py", "from guides import MeanField"),
    (installed_names, "guides/radial.py", "from tests.oracles import normal"),
    (pyro_insides, "pyro_forget/energy.py", "from pyro import poutine"),
    (pyro_insides, "pyro_forget/energy.py", "from pyro.poutine import trace"),
    (pyro_insides, "pyro_forget/energy.py", "import pyro\npyro.poutine.trace(f)"),
    (pyro_insides, "pyro_forget/energy.py", "import pyro\npyro.get_param_store().clear()"),
    (pyro_insides, "pyro_forget/energy.py", "from pyro.params.param_store import ParamStoreDict"),
    (pyro_insides, "models/mlp.py", "from pyro.poutine.messenger import Messenger"),
    (pyro_insides, "guides/radial.py", "from pyro.poutine import trace"),
    (one_forgetter_a_file, "pyro_forget/forgetters/influence.py", "from pyro_forget.forgetters import Retrain"),
    (one_loop_over_data, "pyro_forget/evaluation/distance.py", "for batch in data.batches(): pass"),
    (one_loop_over_data, "models/mlp.py", "rows = list(minibatches(32, generator))"),
    (no_asserts, "pyro_forget/energy.py", "assert x > 0"),
    (no_pickle, "pyro_forget/posterior.py", "import pickle"),
    (no_pickle, "pyro_forget/posterior.py", "torch.load(path)"),
    (no_pickle, "pyro_forget/posterior.py", "torch.load(path, weights_only=False)"),
    (sizes, "pyro_forget/energy.py", "x = 1\n" * 301),
    (sizes, "pyro_forget/energy.py", "def f():\n" + "    x = 1\n" * 40),
]
KEPT = [
    (layers, "pyro_forget/posterior.py", "from pyro_forget.energy import Energy"),
    (layers, "pyro_forget/posterior.py", "from pyro_forget import params"),
    (layers, "pyro_forget/effects/plate.py", "from .trace import sites"),
    (layers, "pyro_forget/effects/plate.py", "from ..params import Params"),
    (layers, "pyro_forget/__init__.py", "from pyro_forget.forgetting import forget"),
    (layers, "pyro_forget/cli/__init__.py", "from pyro_forget import __version__"),
    (nothing_from_outside, "pyro_forget/cli/demo.py", "def f():\n    from pyro_forget.models import MLP"),
    (installed_names, "models/mlp.py", "from pyro_forget.guides import MeanField"),
    (pyro_insides, "pyro_forget/effects/trace.py", "from pyro import poutine"),
    (pyro_insides, "pyro_forget/energy.py", "import pyro.distributions as dist\nfrom pyro.infer import SVI"),
    (pyro_insides, "guides/radial.py", "from pyro.poutine.messenger import Messenger"),
    (one_forgetter_a_file, "pyro_forget/forgetters/default.py", "from pyro_forget.forgetters import Retrain"),
    (one_loop_over_data, "pyro_forget/inference/sgld.py", "for batch in data.batches(): pass"),
    (one_loop_over_data, "pyro_forget/energy.py", "data.reduce(share)"),
    (one_loop_over_data, "pyro_forget/effects/plate.py", "first = next(data.batches())"),
    (no_pickle, "pyro_forget/posterior.py", "torch.load(path, weights_only=True)"),
    (sizes, "pyro_forget/energy.py", 'def f():\n    """One.\n' + "\n" * 45 + '    """\n' + "    x = 1\n" * 39),
]


def name_of(case: object) -> str:
    return case.__name__ if callable(case) else textwrap.shorten(str(case), 40)


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN, ids=name_of)
def test_a_rule_sees_what_breaks_it(rule, path, text):
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), KEPT, ids=name_of)
def test_a_rule_lets_pass_what_keeps_it(rule, path, text):
    assert not list(rule(Source(path, text)))
