"""The rooms of the library: who imports whom, who knows a method's name, and that what is public is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms.join import Joinable

import stiefel
from stiefel.compat import torch_private

ROOT = Path(stiefel.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = ["geoopt", "sklearn", "matplotlib", "pandas"]

# What each room may import of this library beside itself and the errors: all imports count, in functions and for types
# alone too. A file belongs to the longest of these names that it is below.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "layout": set(),
    "compat": set(),
    "linalg": {"compat"},
    "manifold": {"linalg", "layout", "compat"},
    "constraint": {"manifold", "linalg", "layout", "compat"},
    "methods": {"constraint", "manifold", "linalg", "layout"},
    "optim/solve": {"manifold", "linalg"},
    "optim": {"constraint", "manifold", "linalg", "layout", "compat"},
    "attach/proxy": {"optim", "methods", "constraint", "linalg", "layout", "compat"},
    "attach": {
        "attach/proxy",
        "optim/solve",
        "optim",
        "methods",
        "constraint",
        "manifold",
        "linalg",
        "layout",
        "compat",
    },
    "nn": {"attach", "constraint", "linalg", "compat"},
    "measure": {"measure/model", "measure/cost", "measure/monitor"},
    "measure/model": {
        "measure/cost",
        "attach",
        "optim",
        "methods",
        "constraint",
        "manifold",
        "linalg",
        "layout",
        "compat",
    },
    "measure/cost": {"compat"},
    "measure/monitor": {"measure/model", "measure/cost", "attach", "linalg"},
    "compare/record": set(),
    "compare/problem": {"attach", "constraint", "compat"},
    "compare/plan": {"compare/record", "methods"},
    "compare/worker": {
        "compare/record",
        "compare/problem",
        "measure/model",
        "measure/cost",
        "attach",
        "compat",
        "constraint",
    },
    "compare/driver": {"compare/record", "compare/plan", "compare/problem", "compare/worker", "constraint"},
    "compare/analyse": {"compare/record"},
    "compare/present": {"compare/analyse", "compare/record"},
    "compare/arguments": {"compare/driver", "compare/plan", "measure/cost"},
    "compare/cli": {"compare/arguments", "compare/driver", "compare/problem", "compare/present", "compare/record"},
    "compare": {"compare/problem", "compare/present"},
}
FACES = {"__init__", "__main__"}
"""Files of the package itself, which may import every room."""
TEMPLATE = "compare/problem/template.py"
"""A file that is written for users, and imports what they do."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    inside = relative(path).removesuffix(".py")
    return max((name for name in MAY_IMPORT if f"{inside}/".startswith(f"{name}/")), key=len, default=inside)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, each with what is taken of it where that is a module."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            taken = [alias.name for alias in node.names if (node.module, alias.name) != ("stiefel", "__version__")]
            found += [_module(f"{node.module}.{name}") or node.module or "" for name in taken]
    return found


def _module(name: str) -> str | None:
    """The name, if it is a module's of this library."""
    inside = ROOT.parent.joinpath(*name.split("."))
    return name if inside.with_suffix(".py").is_file() or (inside / "__init__.py").is_file() else None


def file_of(name: str) -> Path:
    inside = ROOT.parent.joinpath(*name.split("."))
    return inside.with_suffix(".py") if inside.with_suffix(".py").is_file() else inside / "__init__.py"


def rooms_imported(path: Path) -> set[str]:
    ours = [name for name in imported(path) if name.split(".")[0] == "stiefel"]
    return {room(file_of(name)) for name in ours} - {room(path)}


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in MAY_IMPORT and relative(f) != TEMPLATE], ids=relative)
def test_arrows_point_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[room(path)] | {"errors"}
    others = rooms_imported(path)
    assert others <= allowed, f"{relative(path)} imports {others - allowed}; {room(path)} may import {allowed}"


def test_every_file_is_in_a_room() -> None:
    assert {room(f) for f in FILES} == FACES | set(MAY_IMPORT)


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """What lies on a circle of arrows."""
    left = dict(arrows)
    while left:
        reached = set().union(*left.values())
        ends = [name for name, others in left.items() if not others & set(left) or name not in reached]
        if not ends:
            break
        for name in ends:
            del left[name]
    return sorted(left)


def test_no_rooms_form_a_circle() -> None:
    assert circles(MAY_IMPORT) == []


def reached(start: str) -> set[str]:
    """The rooms to which arrows lead from one."""
    found: set[str] = set()
    left = [start]
    while left:
        new = MAY_IMPORT[left.pop()] - found
        found |= new
        left += new
    return found


def test_the_picture_of_the_rooms_has_their_arrows() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"```mermaid\n(.*?)```", text, flags=re.S)
    names = dict(re.findall(r'(\w+)\["(.*?)"\]', picture))
    plain = re.sub(r'\[".*?"\]', "", picture)
    drawn = [(names.get(a, a), names.get(b, b)) for a, b in re.findall(r"(\w+) --> (\w+)", plain)]
    faces = {"measure", "compare", "errors"}
    wanted = {
        (a, b)
        for a, others in MAY_IMPORT.items()
        for b in others
        if a not in faces and not any(b in reached(other) for other in others)
    }
    assert sorted(drawn) == sorted(wanted)


def test_the_files_that_the_architecture_names_are_there() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 20
    known = [f"/{relative(f)}" for f in FILES] + ["/tests/test_architecture.py"]
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in known)] == []


def test_no_modules_form_a_circle() -> None:
    arrows = {relative(f): {relative(file_of(n)) for n in imported(f) if n.split(".")[0] == "stiefel"} for f in FILES}
    del arrows[TEMPLATE]
    assert circles({f: others - {f} for f, others in arrows.items()}) == []


def entries_and_arrows(folder: str) -> tuple[int, int]:
    """How many rooms and files stand in a folder beside its face, and how many arrows go between them."""
    root = ROOT / folder

    def entry(path: Path) -> str:
        return path.relative_to(root).parts[0].removesuffix(".py")

    inside = [f for f in FILES if root in f.parents and not (f.parent == root and f.stem in FACES)]
    arrows = {
        (entry(f), entry(file_of(name)))
        for f in inside
        for name in imported(f)
        if name.split(".")[0] == "stiefel" and file_of(name) in inside
    }
    return len({entry(f) for f in inside}), len({(a, b) for a, b in arrows if a != b})


@pytest.mark.parametrize(("folder", "entries", "arrows"), [("", 12, 45), ("compare", 9, 18), ("measure", 4, 5)])
def test_a_folder_is_seen_at_a_glance(folder: str, entries: int, arrows: int) -> None:
    found = entries_and_arrows(folder)
    assert found[0] <= entries
    assert 0 < found[1] <= arrows


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"e"}, "e": {"d"}}) == ["d", "e"]


@pytest.mark.parametrize("path", [f for f in FILES if room(f) == "methods" and f.stem != "__init__"], ids=relative)
def test_a_method_knows_no_other_method(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("stiefel.methods.")]


def test_linalg_and_geometry_know_no_modules_and_no_optimizers() -> None:
    for path in FILES:
        if room(path) in ("linalg", "layout") or path.stem == "geometry":
            for node in ast.walk(tree(path)):
                assert not (isinstance(node, ast.Attribute) and node.attr in ("nn", "optim")), relative(path)


def test_one_file_imports_geoopt() -> None:
    users = [relative(f) for f in FILES if any(name.split(".")[0] == "geoopt" for name in imported(f))]
    assert users == ["compat/geoopt.py"]


# --- sizes ---

CATALOGUES = ("methods", "linalg")
"""Folders in which files stand side by side, as many as there are: a method or a matrix function each."""


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_module_fits_a_few_screens_and_a_function_one(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: lines for f in functions if f.end_lineno and (lines := f.end_lineno - f.lineno + 1) > 50}
    assert not long


def test_a_folder_holds_no_more_than_one_can_look_through() -> None:
    modules = Counter(f.parent for f in FILES if f.stem != "__init__" and f.parent.name not in CATALOGUES)
    assert {f"{folder}: {n}" for folder, n in modules.items() if n > 14} == set()


# --- what torch does not promise, and what a device is asked ---


def private_names_of_torch(path: Path) -> set[str]:
    """Names with one leading underscore that a file takes from torch, or from objects of a class that it does not own.

    Attributes of ``self``, ``cls`` and of names of this library are the file's own.
    """
    module = tree(path)
    own = {node.name for node in ast.walk(module) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in ast.walk(module) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {part for part in (node.module or "").split(".") if _is_private(part)}
            found |= {alias.name for alias in node.names if _is_private(alias.name)}
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch._"):
            found.add(node.value)
    return found & set(KNOWN_TO_TORCH) | {name for name in found if name.startswith("torch.")}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


KNOWN_TO_TORCH = (
    {name for cls in (torch, torch.nn.Module, torch.nn.RNNBase, torch.Tensor) for name in dir(cls)}
    | {name.rpartition(".")[2] for name in torch_private.PRIVATE_NAMES}
    | set(vars(torch.nn.Linear(1, 1)))
    | set(vars(torch.nn.LSTM(1, 1)))
)


@pytest.mark.parametrize("path", [f for f in FILES if relative(f) != "compat/torch_private.py"], ids=relative)
def test_one_file_has_the_private_names_of_torch(path: Path) -> None:
    assert private_names_of_torch(path) == set()


@pytest.mark.parametrize("name", torch_private.PRIVATE_NAMES)
def test_torch_still_has_what_it_does_not_promise(name: str) -> None:
    """A newer torch that lacks one fails here, by name, and not somewhere in a training step."""
    module, _, attribute = name.rpartition(".")
    owner: Any = None
    for part in module.split("."):
        owner = importlib.import_module("torch") if part == "torch" and owner is None else _part(owner, part)
    layer, recurrent, overload = torch.nn.Linear(1, 1), torch.nn.LSTM(1, 1), torch.ops.aten.add.Tensor
    instances = {torch.nn.Module: layer, torch.nn.RNNBase: recurrent, type(overload): overload, Joinable: Uneven()}
    instance = instances.get(owner, owner) if isinstance(owner, type) else owner
    assert hasattr(instance, attribute) or hasattr(owner, attribute), f"torch {torch.__version__} has no {name}"


class Uneven(Joinable):
    """The least that can take part where processes have uneven inputs."""

    join_hook = join_device = join_process_group = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()


def _part(owner: Any, name: str) -> Any:
    if inspect.ismodule(owner) and not hasattr(owner, name):
        return importlib.import_module(f"{owner.__name__}.{name}")
    return getattr(owner, name)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_linalg_and_measuring_alone_ask_for_the_device(path: Path) -> None:
    asked = {n.attr for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)}
    if room(path) not in ("linalg", "measure/cost", "measure/monitor"):
        assert not asked & {"is_cuda", "is_current_stream_capturing"}


@pytest.mark.parametrize(
    "code",
    [
        "import stiefel",
        "import stiefel, torch; m = stiefel.constrain(torch.nn.Linear(2, 2)); "
        "stiefel.optimizer(m, torch.optim.SGD, lr=0.1); stiefel.report(m)",
    ],
    ids=["import", "use"],
)
def test_heavy_packages_are_not_imported_before_they_are_needed(code: str) -> None:
    code += f"\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# --- nobody but a method's own file knows its name ---


def docstrings(module: ast.Module) -> set[int]:
    """Ids of the constants that stand alone as a statement: docstrings, and the notes below an attribute."""
    return {
        id(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def defaults(module: ast.Module) -> set[int]:
    """Ids of the constants that are an argument's default."""
    functions = (n for n in ast.walk(module) if isinstance(n, ast.FunctionDef))
    return {id(d) for f in functions for d in (*f.args.defaults, *f.args.kw_defaults) if d is not None}


def method_names_in(source: str) -> list[tuple[int, str]]:
    """Lines of a source at which a string that equals a method's name stands anywhere but in prose or a default."""
    module = ast.parse(source)
    allowed = docstrings(module) | defaults(module)
    return [
        (node.lineno, node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and node.value in stiefel.available() and id(node) not in allowed
    ]


@pytest.mark.parametrize("path", [f for f in FILES if room(f) != "methods"], ids=relative)
def test_no_file_outside_methods_names_a_method(path: Path) -> None:
    assert method_names_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('if name == "own":\n    pass', True),
        ('match name:\n    case "soft":\n        pass', True),
        ('TABLE = {"riemannian": 1}', True),
        ('def constrain(module, constraint="own"):\n    """own"""', False),
        ('text = "use own instead"', False),
        ('metric = "euclidean"', False),
    ],
)
def test_the_search_for_names_finds_them(source: str, found: bool) -> None:
    assert bool(method_names_in(source)) is found


def test_no_file_outside_methods_imports_a_methods_class() -> None:
    for path in FILES:
        if room(path) != "methods":
            assert not [name for name in imported(path) if name.startswith("stiefel.methods.")], relative(path)


# --- documentation ---


def public_callables() -> dict[str, Callable[..., Any]]:
    """Functions and classes of the public face, and the public methods and properties of its classes."""
    found: dict[str, Any] = {name: getattr(stiefel, name) for name in stiefel.__all__}
    for name, value in list(found.items()):
        if inspect.isclass(value):
            for member, inner in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property)):
                    found[f"{name}.{member}"] = inner
    return found


PUBLIC = public_callables()


def test_the_public_face_is_sorted_and_importable() -> None:
    assert list(stiefel.__all__) == sorted(stiefel.__all__)
    assert all(hasattr(stiefel, name) for name in stiefel.__all__)


@pytest.mark.parametrize(
    "name", ["constrain", "optimizer", "penalty", "report", "release", "available", "get", "register"]
)
def test_the_promised_calls_are_public(name: str) -> None:
    assert name in stiefel.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring_whose_first_line_is_one_sentence(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.strip(), f"stiefel.{name} has no docstring"
    generated = inspect.isclass(PUBLIC[name]) and text.startswith(f"{name}(")  # a dataclass writes its own signature
    assert not generated, f"stiefel.{name} has only the docstring that dataclass generates"
    first, _, rest = text.partition("\n")
    assert first.endswith("."), f"{name}: {first!r} does not end its sentence"
    assert not re.search(r"[.!?] [A-Z]", first), f"{name}: {first!r} is more than one sentence"
    assert not rest or rest.startswith("\n"), f"{name}: no empty line after the first"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_says_first_what_it_is_for(path: Path) -> None:
    text = ast.get_docstring(tree(path))
    assert text, f"{relative(path)} has no module docstring"


@pytest.mark.parametrize("method", stiefel.available())
def test_a_method_says_what_it_is(method: str) -> None:
    cls = type(stiefel.get(method))
    assert cls.name == method
    assert cls.place in ("forward", "loss", "step", "none")
    assert cls.summary
    assert cls.reference
    assert cls.__dataclass_params__.frozen
    text = inspect.getdoc(cls) or ""
    options = set(cls.__dataclass_fields__) - set(stiefel.Constraint.__dataclass_fields__)
    inherited = inspect.getdoc(cls.__mro__[1]) or ""
    assert all(f"{option}:" in text + inherited for option in options)


@pytest.mark.parametrize("method", stiefel.available())
def test_a_tuning_space_has_options_of_the_method_and_values_that_it_takes(method: str) -> None:
    cls = type(stiefel.get(method))
    common = set(stiefel.Constraint.__dataclass_fields__)
    for option, values in cls.tuning.items():
        assert option in set(cls.__dataclass_fields__) - common
        assert len(set(values)) == len(values) > 1
        assert all(getattr(stiefel.get(method, **{option: value}), option) == value for value in values)


# --- tests mirror the house ---


def test_few_tests_stand_loose() -> None:
    loose = [path.name for path in Path(__file__).parent.glob("test_*.py")]
    assert len(loose) <= 4, loose
