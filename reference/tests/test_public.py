"""What every public name of the reference has: documentation, short code, clear errors."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import moe_reference
import pytest
import torch
from moe_reference.dispatch import inverse_permutation

_spec = importlib.util.spec_from_file_location("calls", Path(__file__).with_name("calls.py"))
calls = sys.modules["calls"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(calls)

MODULES = {
    info.name: importlib.import_module(f"moe_reference.{info.name}")
    for info in pkgutil.iter_modules(moe_reference.__path__)
}
PUBLIC = {
    f"{stem}.{name}": value
    for stem, module in MODULES.items()
    for name, value in vars(module).items()
    if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}

MOST_LINES_OF_A_FILE = 260
MOST_LINES_OF_A_BODY = 60

# Of one tensor or several; a class of tensors has its shapes in its own docstring.
TENSOR = re.compile(r"^(?!.*(Mapping|Callable)).*\bTensor\b")
# `[T, E]`, a dtype, that any will do, or where it stands.
SHAPE_OR_DTYPE = re.compile(
    r"\[[^\]]+\]|float|int32|int64|bool|any (shape|dtype)|scalar|a number|as in `|those of `"
)
# "Arguments and errors are those of `experts`.", "otherwise as `slice_experts`".
ELSEWHERE = re.compile(r"[Aa]rguments[^.`]*`|(otherwise as|inverse of) `")


# documentation


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    own = PUBLIC[name].__dict__.get("__doc__") if name in CLASSES else PUBLIC[name].__doc__
    assert own, name
    first, *rest = inspect.cleandoc(own).splitlines()
    assert first.endswith((".", ":")) or (rest and rest[0]), f"{name}: {first!r} is no sentence"
    # A dataclass without a docstring of its own has its signature there.
    assert not first.startswith(f"{PUBLIC[name].__name__}("), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_doctest(name):
    assert ">>> " in (FUNCTIONS[name].__doc__ or ""), name


def documented(docstring, section="Args"):
    """The names and texts of a section."""
    match = re.search(rf"^{section}:\n((?:(?:    .*)?\n)+)", docstring + "\n", re.MULTILINE)
    found, names = {}, []
    for line in match[1].splitlines() if match else ():
        start = re.match(r"    \*?(\w[\w, ]*): (.*)", line)
        if start:
            names = [name.strip() for name in start[1].split(",")]
            found |= dict.fromkeys(names, start[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented_with_its_shape_or_dtype(name):
    docstring = inspect.getdoc(FUNCTIONS[name]) or ""
    texts = documented(docstring)
    missing, vague = [], []
    for argument, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        text = texts.get(argument)
        if text is None:
            # In a single sentence: `permutation` [S].
            inline = re.search(rf"`{argument}` ?\[", docstring)
            if not inline and not ELSEWHERE.search(docstring):
                missing.append(argument)
        elif TENSOR.search(str(parameter.annotation)) and not SHAPE_OR_DTYPE.search(text):
            vague.append(argument)
    assert not missing, f"{name}: no line for {', '.join(missing)}"
    assert not vague, f"{name}: neither shape nor dtype of {', '.join(vague)}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_argument_is_documented_that_there_is_not(name):
    names = set(documented(inspect.getdoc(FUNCTIONS[name]) or ""))
    assert names <= set(inspect.signature(FUNCTIONS[name]).parameters)


@pytest.mark.parametrize("name", [n for n in CLASSES if dataclasses.is_dataclass(CLASSES[n])])
def test_every_field_is_documented(name):
    names = [field.name for field in dataclasses.fields(CLASSES[name])]
    assert list(documented(inspect.getdoc(CLASSES[name]), "Attributes")) == names


# size and letters


@pytest.mark.parametrize("stem", MODULES)
def test_files_are_short(stem):
    lines = len(inspect.getsource(MODULES[stem]).splitlines())
    assert lines <= MOST_LINES_OF_A_FILE, f"{stem}.py has {lines} lines"


def functions_of(stem):
    tree = ast.parse(inspect.getsource(MODULES[stem]))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("stem", MODULES)
def test_functions_are_short(stem):
    for node in functions_of(stem):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= MOST_LINES_OF_A_BODY, f"{stem}.{node.name} has {lines} lines"


@pytest.mark.parametrize("stem", MODULES)
def test_suffixes_are_letters_of_the_key(stem):
    """A local tensor's name ends in the letters of its shape; 1 is a dimension of size 1."""
    docstring = MODULES[stem].__doc__ or ""
    key = re.search(r"Dimension key:((?:.+\n?)+)", docstring)
    letters = set(re.findall(r"\b([A-Z])\b", key[1])) if key else set()
    for node in functions_of(stem):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        names |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        for name in names:
            suffix = re.fullmatch(r"(?:[a-z]\w*?|[A-Z])_([A-Z1]*[A-Z][A-Z1]*)", name)
            unknown = set(suffix[1]) - letters - {"1"} if suffix else set()
            assert not unknown, f"{stem}.{node.name}: {name} has letters that the key has not"


# wrong arguments

# Inside of what other functions do, which have checked.
UNCHECKED = {
    "feed_forward",
    "grouped_product",
    "one_by_one",
    "product",
    "router_logits",
    "rows_in_use",
    "shared_expert",
}
CALLS = {
    name: call for name, call in calls.make_calls().items() if name.split()[0] not in UNCHECKED
}

# Where an argument of another dtype or shape is a right one.
ANY_DTYPE = {
    ("take_tensors", "tensors"),
    *((name, "tokens_per_expert") for name in ("balance_loss", "update_bias", "global_counts")),
}
ANY_SHAPE = {
    ("scores", "logits"),
    ("activate", "pre_activation"),
    ("local_ids", "expert_ids"),
    ("count_tokens", "expert_ids"),
    ("read_gate", "output"),
    ("inject_loss", "output"),
    ("inject_scaled_loss", "output"),
    ("jitter", "x"),
    ("take_tensors", "tensors"),
    # Any vector is a share of one expert fewer or more.
    ("global_counts", "tokens_per_expert"),
}


def wrong_values(name, path, tensor):
    """What the argument must not be, with the error that it deserves."""
    function = name.split()[0]
    yield "an int", 3, TypeError
    yield "a list", [1.0], TypeError
    if (function, path[0]) not in ANY_DTYPE:
        yield (
            "another dtype",
            tensor.long() if tensor.is_floating_point() else tensor.double(),
            (TypeError),
        )
    if tensor.is_floating_point() and (function, path[0]) not in ANY_DTYPE:
        yield "complex", tensor.to(torch.complex64), TypeError
    if (function, path[0]) not in ANY_SHAPE:
        yield "one dimension too many", tensor[None], ValueError
        if tensor.ndim > 0:
            yield "one dimension too few", tensor[0], ValueError


WRONG = [
    pytest.param(name, path, id=f"{name}-{'.'.join(map(str, path))}")
    for name, call in CALLS.items()
    for path, _ in calls.walk(call.arguments)
]


@pytest.mark.parametrize(("name", "path"), WRONG)
def test_a_wrong_argument_is_named(name, path):
    call = CALLS[name]
    tensor = dict(calls.walk(call.arguments))[path]
    argument = next(part for part in reversed(path) if isinstance(part, str))
    # What a gate gave back is called by what it was declared to be.
    argument = {"output": "logits"}.get(argument, argument) if name == "read_gate" else argument
    problems = []
    for what, value, error in wrong_values(name, path, tensor):
        try:
            call.function(**calls.replace_in(call.arguments, path, value))
            problems.append(f"{what}: no error")
        except error as raised:
            if not re.search(rf"\b{argument}\b", str(raised)):
                problems.append(f"{what}: not named in {str(raised)!r}")
        except Exception as raised:
            problems.append(f"{what}: {type(raised).__name__}: {raised}")
    assert not problems, "\n".join(problems)


def test_what_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match="permutation"):
        inverse_permutation(torch.tensor([0, 0, 2]))
