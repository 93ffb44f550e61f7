"""What runs in the target's own process: load it, call it, say what came back.

Nothing here judges. The process that judges never imports the target; it sends a session of calls
as data and gets answers as data: outputs as plain tensors, gradients, whether an input was changed,
whether an output shares memory with an input, what happened to torch's global state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from moe_conformance.codec import from_bytes, replace_tensors, to_bytes, walk
from moe_conformance.target import Target, Unsupported

ENTRY_POINTS = "moespec.targets"
DETERMINISTIC = "deterministic algorithms"
FILL = "fill_uninitialized_memory"
"""A switch of torch.utils.deterministic that its type information does not know."""

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "pitched", "spaced")
"""What `lay_out` knows for any numbers."""

GRAD_MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "recording": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
"""What a session may run under."""

LOG_BYTES = 2**20
"""What a target has printed is thrown away beyond this many bytes."""

_loaded: dict[str, Target] = {}
_sessions = 0


class LoadError(Exception):
    """The target's name leads to nothing that can be tested; the message says why."""


class UnknownTarget(LoadError):
    """There is nothing of that name; the command line was wrong."""


def serve(connection: Any, log: str) -> None:
    """Answer what comes over the pipe until it is closed: (function, arguments) each time.

    The answer is the function's result and None, or None and the exception.
    """
    start(log)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer, failure = None, None
        try:
            answer = function(*arguments)
        except LoadError as error:
            failure = error
        connection.send((answer, failure))


def start(log: str) -> None:
    """Make this process a worker: a group of its own, silent, and gone when its parent is."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    torch.set_num_threads(1)
    _limit_memory()
    follow_parent()


def follow_parent() -> None:
    """End this process as soon as the one that started it has ended, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _limit_memory() -> None:
    """A target that leaks gets an error before the machine has no memory left.

    What it gets is three quarters of the machine's memory, counted as data: reserved addresses, of
    which CUDA takes many, are not. Where that is not enough because others use memory as well, the
    kernel is told to end this process first.
    """
    if sys.platform != "linux":
        return
    import resource

    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = physical * 3 // 4
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(0)


def find(name: str) -> Callable[[], Target] | Mapping[str, Callable[[], Target]]:
    """What a target name means: a factory of one target, or of several by variant.

    Raises:
        LoadError: there is no such target, or it cannot be imported.
    """
    try:
        if ":" in name:
            where, _, attribute = name.rpartition(":")
            module = _import(where)
            if not hasattr(module, attribute):
                raise UnknownTarget(
                    f"target: expected a class of '{where}', got '{attribute}', which it does "
                    f"not define"
                )
            found = getattr(module, attribute)
        else:
            found = _entry(name).load()
    except LoadError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise LoadError(
            f"target '{name}' could not be loaded: {type(error).__name__}: {error} "
            f"({Path(last.filename).name}:{last.lineno})"
        ) from error
    if isinstance(found, type) and issubclass(found, Target):
        return found
    made = found() if callable(found) else found
    if isinstance(made, Mapping):
        return made
    if isinstance(made, Target):
        return lambda: made
    raise LoadError(f"target '{name}': expected a moe_conformance.Target, got {found!r}")


def _entry(name: str) -> EntryPoint:
    known = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in known:
        raise UnknownTarget(
            f"target: expected path/to/file.py:Class, package.module:Class or one of "
            f"{', '.join(sorted(known))}, got '{name}'"
        )
    return known[name]


def _import(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    if not path.is_file():
        raise UnknownTarget(f"target: expected a Python file, got '{where}', which is none")
    module_name = f"moespec_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def variants(name: str) -> list[str]:
    """The names of the targets that `name` stands for: `name/variant` each, or `name` itself.

    Raises:
        LoadError: see `find`.
    """
    base, _, variant = name.partition("/") if ":" not in name else (name, "", "")
    found = find(base)
    if not isinstance(found, Mapping):
        if variant:
            raise UnknownTarget(f"target: '{base}' has no variants, got '{name}'")
        return [base]
    if not variant:
        return [f"{base}/{each}" for each in found]
    if variant not in found:
        raise UnknownTarget(
            f"target: expected one of the variants {', '.join(found)} of '{base}', got '{variant}'"
        )
    return [name]


def make(name: str) -> Target:
    """The target of that name.

    Raises:
        LoadError: see `find`; or its constructor failed.
    """
    base, _, variant = name.partition("/") if ":" not in name else (name, "", "")
    found = find(base)
    if isinstance(found, Mapping) and variant not in found:
        raise UnknownTarget(
            f"target: expected one of the variants {', '.join(found)} of '{base}', got '{variant}'"
        )
    factory = found[variant] if isinstance(found, Mapping) else found
    try:
        return factory()
    except Exception as error:
        raise LoadError(f"target '{name}': {type(error).__name__}: {error}") from error


def load(name: str) -> dict[str, Any]:
    """Make the target, keep it for `run`, and describe it.

    Raises:
        LoadError: see `make`.
    """
    target = make(name)
    _loaded.clear()
    _loaded[name] = target
    return {
        "name": target.name or name,
        "version": target.version,
        "capabilities": target.capabilities.to_json(),
        "operations": list(type(target).operations()),
        "devices": _devices(),
        "gpus": torch.cuda.device_count(),
        "triton": _version("triton"),
    }


def _devices() -> dict[str, str]:
    found = {"cpu": ""}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        found["mps"] = "Apple"
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(name: str, session: bytes) -> bytes:
    """Run one session of calls on a loaded target and return its answers."""
    global _sessions
    _sessions += 1
    if _sessions % 64 == 0 and os.fstat(1).st_size > LOG_BYTES:
        os.ftruncate(1, 0)
    draw_once()
    return answers_to_bytes(run_session(_loaded[name], from_bytes(session)))


def draw_once() -> None:
    """Move torch's random state on: where a seed was just set, the same one set again shows then.

    Once for a session and not for a call: ranks that are threads share the state.
    """
    torch.rand(())


def loaded(name: str) -> Target:
    """The target that `load` made in this process."""
    return _loaded[name]


def answers_to_bytes(answers: list[dict[str, Any]]) -> bytes:
    """Answers for the way back; one that has no place in a call is an error of the target."""
    try:
        return to_bytes(answers)
    except Exception as error:
        # That is the target's doing, not the suite's.
        nothing: dict[str, Any] = {"gradients": {}, "changed": [], "shared": [], "state": []}
        return to_bytes([{**nothing, "error": _error(error), "seconds": answers[-1]["seconds"]}])


def run_session(
    target: Target, session: dict[str, Any], tell: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Run calls one after the other on the same target.

    Args:
        target: the implementation.
        session: `device`, and `calls`: each with `operation`, `arguments`, and optionally
            `layouts` (argument path to layout name), `wrt` and `cotangents` (which gradients, of
            what), `cotangent_layout` (what `lay_out` knows, or `expanded`), `backward` ("at once";
            "twice", through a graph that is kept; or "late", after all calls), `reuse` (index of
            an earlier call whose argument storage is written over); and what `surroundings` reads.
        tell: called with the name of each step before it is taken.

    Returns:
        One answer per call; after an exception the calls that follow are not made.
    """
    with surroundings(session):
        return _run_calls(target, session, tell)


SURROUNDINGS = ("grad_mode", "default_dtype")
"""What `surroundings` reads of a session; a case's inputs of these names become a session's."""


@contextlib.contextmanager
def surroundings(session: dict[str, Any]) -> Iterator[None]:
    """What a caller may have set: `grad_mode`, one of `GRAD_MODES`, and torch's `default_dtype`."""
    before = torch.get_default_dtype()
    if "default_dtype" in session:
        torch.set_default_dtype(getattr(torch, session["default_dtype"]))
    try:
        with GRAD_MODES[session.get("grad_mode", "recording")]():
            yield
    finally:
        torch.set_default_dtype(before)


def _run_calls(
    target: Target, session: dict[str, Any], tell: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    arguments: list[dict[str, Any]] = []
    results: list[Any] = []
    of = len(session["calls"])
    for number, call in enumerate(session["calls"], 1):
        where = f" of call {number} of {of}" if of > 1 else ""

        def say(step: str, where: str = where) -> None:
            if tell is not None:
                tell(f"{step}{where}")

        answer, given, result = _run_call(target, call, session["device"], arguments, say)
        answers.append(answer)
        arguments.append(given)
        results.append(result)
        if answer["error"] is not None:
            break
    for call, answer, given, result in zip(
        session["calls"], answers, arguments, results, strict=False
    ):
        if result is not None and call.get("backward") == "late":
            try:
                answer["gradients"], written = _gradients(result, given, call["wrt"], call)
                answer["changed"] += written
            except BaseException as error:
                answer["error"] = _error(error)
        if result is not None and len(answers) > 1:
            answer["afterwards"] = _plain(result)
    return answers


def _run_call(
    target: Target,
    call: dict[str, Any],
    device: str,
    earlier: list[dict[str, Any]],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    wrt = call.get("wrt") or []
    reuse = call.get("reuse")
    given = place_arguments(call, device, wrt, None if reuse is None else earlier[reuse])
    before = [(path, tensor.detach().clone()) for path, tensor in walk(given)]
    poisoned = bool(call.get("poison"))
    state = _global_state()
    began = time.perf_counter()
    answer: dict[str, Any] = {"error": None, "gradients": {}, "changed": [], "shared": []}
    result = None
    written: list[str] = []
    try:
        if poisoned:
            # Fresh memory is filled with NaN, so what a target never wrote shows in its result.
            setattr(torch.utils.deterministic, FILL, True)
            torch.set_deterministic_debug_mode("warn")
        say("the forward pass")
        result = getattr(target, call["operation"])(**given)
        if wrt and call.get("backward") != "late":
            say("the backward pass")
            answer["gradients"], written = _gradients(result, given, wrt, call)
        if device == "cuda":
            torch.cuda.synchronize()
        say("the reading of its results")
        answer["outputs"] = _plain(result)
        answer["kinds"] = [
            [path, str(t.dtype).removeprefix("torch."), t.device.type, _kind(t)]
            for path, t in walk(_tree(result))
        ]
        answer["shared"] = _shared(result, given)
    except BaseException as error:
        answer["error"] = _error(error)
        result = None
    answer["seconds"] = time.perf_counter() - began
    changed_state = _restore(state)
    answer["state"] = [s for s in changed_state if not (poisoned and s == DETERMINISTIC)]
    answer["changed"] = [
        path
        for (path, old), (_, new) in zip(before, walk(given), strict=True)
        if not _same(old, new)
    ] + written
    return answer, given, result


def _kind(tensor: torch.Tensor) -> str:
    """The type's name; said to be expanded where one place in memory is several elements."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    expanded = tensor.numel() > 1 and any(stride == 0 and size > 1 for stride, size in steps)
    return f"{type(tensor).__name__}{' (expanded)' if expanded else ''}"


def _error(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "unsupported": isinstance(error, Unsupported),
        "traceback": "".join(traceback.format_exception(error, limit=-6)[-6:])[-4000:],
    }


def place_arguments(
    call: dict[str, Any],
    device: str,
    wrt: Sequence[str] = (),
    storage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A call's arguments as a target gets them.

    Args:
        call: see `run_session`.
        device: where they go.
        wrt: paths of those that gradients are asked of.
        storage: arguments of an earlier call. What fits is written over and is the same object
            again, as a parameter is after an optimizer's step.
    """
    layouts = call.get("layouts") or {}
    old = dict(walk(storage)) if storage is not None else {}

    def place(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if path in old and old[path].shape == tensor.shape and old[path].dtype == tensor.dtype:
            # A target that has written to it may have made it part of a graph.
            same = old[path] if old[path].is_leaf else old[path].detach()
            with torch.no_grad():
                laid = same.copy_(tensor)
        else:
            # An id that means *not here* is legal and never right. Of a map, a table or a count it
            # would be an error that ends the call, and hides the answer that is wrong without one.
            between = 2**20 if path == "expert_ids" else 0
            laid = lay_out(tensor.to(device), layouts.get(path, "contiguous"), between)
        return laid.requires_grad_(path in wrt)

    given: dict[str, Any] = replace_tensors(call["arguments"], place)
    if storage is None:
        return given
    return {
        name: storage[name] if _is_still(value, storage.get(name)) else value
        for name, value in given.items()
    }


def _is_still(new: Any, old: Any) -> bool:
    """Whether these are the same tensors, or dataclasses of the same tensors and equal values."""
    if isinstance(new, torch.Tensor) or isinstance(old, torch.Tensor):
        return new is old
    if dataclasses.is_dataclass(new) and type(new) is type(old):
        names = [f.name for f in dataclasses.fields(new)]
        return all(_is_still(getattr(new, n), getattr(old, n)) for n in names)
    return bool(new == old)


def lay_out(tensor: torch.Tensor, layout: str, between: int = 0) -> torch.Tensor:
    """The same values at other strides; what lies between them is poison.

    Args:
        tensor: any shape, contiguous.
        layout: `contiguous`; `transposed` (the last two dimensions swapped in memory); `strided`
            (every other element of the last dimension of a larger buffer); `offset` (a slice that
            starts inside a larger buffer); `pitched` (rows that are contiguous and lie further
            apart than they are long, as the left part of a wider matrix does); `spaced` (matrices
            likewise, as the first rows of each of several longer ones). Without matrices, `spaced`
            is `pitched`; and with a single dimension, without rows, these two and `transposed` are
            `strided`. `expanded` takes the first row for all, which is in memory once.
        between: the poison of integers; that of floats is NaN.
    """
    if tensor.ndim == 0 or layout == "contiguous":
        return tensor.clone()
    if tensor.ndim == 1 and layout in ("transposed", "pitched", "spaced"):
        # All need rows.
        layout = "strided"
    if tensor.ndim == 2 and layout == "spaced":
        layout = "pitched"
    poison: float = float("nan") if tensor.is_floating_point() else between
    if tensor.dtype is torch.bool:
        poison = True
    elif tensor.dtype is torch.uint8:
        poison = 2**8 - 1
    if layout == "expanded":
        # Behind the row lies as much as there would be of a whole tensor.
        whole = tensor.new_full(tensor.shape, poison)
        whole[:1] = tensor[:1]
        return whole[:1].expand(tensor.shape)
    if layout == "transposed":
        return (
            tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
        )
    *lead, last = tensor.shape
    if layout == "strided":
        wide = tensor.new_full((*lead, 2 * last), poison)
        view = wide[..., ::2]
    elif layout == "pitched":
        wide = tensor.new_full((*lead, last + 1), poison)
        view = wide[..., :last]
    elif layout == "spaced":
        wide = tensor.new_full((*lead[:-1], lead[-1] + 1, last), poison)
        view = wide[..., :-1, :]
    else:
        wide = tensor.new_full((tensor.shape[0] + 2, *tensor.shape[1:]), poison)
        view = wide[1:-1]
    view.copy_(tensor)
    return view


def _gradients(
    result: Any, given: dict[str, Any], wrt: list[str], call: dict[str, Any]
) -> tuple[dict[str, torch.Tensor | None], list[str]]:
    """The gradients, and which of those that came in the backward pass has written to."""
    outputs = dict(walk(_tree(result)))
    inputs = dict(walk(given))
    layout = call.get("cotangent_layout", "contiguous")

    def laid(cotangent: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        placed = cotangent.to(output.device, output.dtype)
        if layout == "expanded":
            return placed.flatten()[:1].sum().expand(placed.shape)
        return lay_out(placed, layout)

    pairs = [
        (outputs[path], laid(cotangent, outputs[path]))
        for path, cotangent in call["cotangents"].items()
        if path in outputs and outputs[path].requires_grad
    ]
    if not pairs:
        return dict.fromkeys(wrt), []
    before = [cotangent.clone() for _, cotangent in pairs]

    def differentiate(keep: bool) -> Sequence[torch.Tensor | None]:
        return torch.autograd.grad(
            [output for output, _ in pairs],
            [inputs[path] for path in wrt],
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
            retain_graph=keep,
        )

    if call.get("backward") == "twice":
        differentiate(True)
    found = differentiate(False)
    written = [
        "the gradient that comes in"
        for old, (_, new) in zip(before, pairs, strict=True)
        if not _same(old, new)
    ]
    return {
        path: None if g is None else g.detach().to("cpu", copy=True)
        for path, g in zip(wrt, found, strict=True)
    }, written[:1]


def _tree(result: Any) -> Any:
    """A result as a dictionary by field, or a list by position."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if isinstance(result, tuple | list):
        return [_tree(item) for item in result]
    if isinstance(result, Mapping):
        return {str(name): _tree(item) for name, item in result.items()}
    if result is None or isinstance(result, torch.Tensor | bool | int | float | str):
        return result
    raise TypeError(
        f"result: expected tensors, numbers or a dataclass of them, got {type(result).__name__}"
    )


def _plain(result: Any) -> Any:
    # In inference mode copies would be inference tensors, which nobody may write to afterwards.
    with torch.inference_mode(False):
        return replace_tensors(
            _tree(result), lambda _, tensor: tensor.detach().to("cpu", copy=True).contiguous()
        )


def _shared(result: Any, given: dict[str, Any]) -> list[str]:
    spans = [(path, _span(tensor)) for path, tensor in walk(given)]
    shared = []
    for out_path, output in walk(_tree(result)):
        low, high = _span(output)
        for path, (start_, stop) in spans:
            if low < stop and start_ < high:
                shared.append(f"{out_path or 'result'} and {path}")
    return shared


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _same(old: torch.Tensor, new: torch.Tensor) -> bool:
    if old.shape != new.shape:
        return False
    return torch.equal(old, new) or bool(((old == new) | ((old != old) & (new != new))).all())


def _global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        DETERMINISTIC: torch.get_deterministic_debug_mode(),
        "random state": torch.random.get_rng_state(),
    }


def _restore(state: dict[str, Any]) -> list[str]:
    now = _global_state()
    changed = [
        name
        for name, value in state.items()
        if not (torch.equal(value, now[name]) if name == "random state" else value == now[name])
    ]
    restore: dict[str, Callable[[Any], object]] = {
        "default dtype": torch.set_default_dtype,
        "grad mode": torch.set_grad_enabled,
        "threads": torch.set_num_threads,
        DETERMINISTIC: _set_deterministic,
        "random state": torch.random.set_rng_state,
    }
    for name in changed:
        restore[name](state[name])
    return changed


def _set_deterministic(mode: int) -> None:
    if "torch._inductor.config" in sys.modules:
        # Changes the compiler's setting as well, and would import the compiler.
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)
