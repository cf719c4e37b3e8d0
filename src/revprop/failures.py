"""Why a model cannot be traced: the reason in plain words, the line of the user's code, and the usual rewrite."""

from __future__ import annotations

import inspect
import itertools
import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, FunctionType

import torch
from torch import fx, nn

__all__ = [
    "Place",
    "explain",
    "find_line",
    "is_of_batch",
    "module_of",
    "of_node",
    "of_stack",
    "of_traceback",
    "on_batch",
    "on_example",
    "on_other_output",
    "on_state",
]

_LIBRARIES = re.compile(r"[/\\](site|dist)-packages[/\\](torch|functorch|numpy)[/\\]")
_PYTHON = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"], "<")  # torch may be run from its source
_HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Place:
    """A line of the user's code, and the module whose forward was running there; empty where unknown."""

    file: str = ""
    line: int = 0
    code: str = ""
    module: str = ""

    def __str__(self) -> str:
        at = f" at {self.file}, line {self.line}: `{self.code}`" if self.file else ""
        return at + (f" (module {self.module})" if self.module else "")


def _is_users(file: str) -> bool:
    """Neither torch's, nor Python's, nor numpy's, nor this package's own (its networks are models like any other)."""
    installed = "site-packages" in file or "dist-packages" in file  # below Python's own folder
    own = _LIBRARIES.search(file) if installed else file.startswith(_PYTHON)
    return not own and str(Path(file).parent) != _HERE


def module_of(model: nn.Module, module: object) -> str:
    """How to call a part of a model: its path and type."""
    path = next((name for name, part in model.named_modules() if part is module), None)
    return f"{path!r}, {type(module).__name__}" if path else ""


def of_traceback(model: nn.Module, error: BaseException) -> Place:
    """Where in the user's code an error was raised: the innermost line that is neither torch's nor Python's."""
    return _innermost(model, traceback.walk_tb(error.__traceback__))


def of_stack(model: nn.Module) -> Place:
    """Where in the model's code the program is: innermost of what the package has called."""
    frames = traceback.walk_stack(None)
    within = [*itertools.takewhile(lambda f: f[0].f_code.co_name != "export_now", frames)]
    return _innermost(model, reversed(within))


def _innermost(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> Place:
    place, module = Place(), ""
    for frame, line in frames:
        file, own = frame.f_code.co_filename, frame.f_locals.get("self")
        if isinstance(own, nn.Module):
            module = module_of(model, own) or module
        if _is_users(file):
            place = Place(file, line, linecache.getline(file, line).strip())
    return Place(place.file, place.line, place.code, module)


def of_node(node: fx.Node) -> Place:
    """Where in the user's code an operator of a traced graph comes from."""
    text = node.meta.get("stack_trace") or ""
    found = [m for m in re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', text) if _is_users(m[0])]
    file, line, code = found[-1] if found else ("", "0", "")
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if isinstance(path, str) and path]
    return Place(file, int(line), code, repr(stack[-1]) if stack else "")


def find_line(model: nn.Module, pattern: str) -> Place:
    """The first line of the model's own methods (but for ``__init__``) that matches, for failures torch gives no line for."""
    for module in model.modules():
        for kind in type(module).__mro__:
            for name, function in vars(kind).items():
                if inspect.isfunction(function) and name != "__init__" and _is_users(function.__code__.co_filename):
                    for i, line in enumerate(_source(function)):
                        if re.search(pattern, line.partition("#")[0]):
                            code = function.__code__
                            return Place(
                                code.co_filename, code.co_firstlineno + i, line.strip(), module_of(model, module)
                            )
    return Place()


def _source(function: FunctionType) -> list[str]:
    try:
        return inspect.getsourcelines(function)[0]
    except (OSError, TypeError):
        return []


# -- what torch says, and what it means ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """A kind of failure: recognised by what torch says and by the line of code, with the reason and the usual rewrite.

    ``search``: where torch gives no line, what to look for in the model's source; ``sure``: the reason holds without it.
    """

    why: str
    rewrite: str
    says: str = ""
    code: str = ""
    search: str = ""
    sure: bool = False

    def fits(self, text: str, code: str) -> bool:
        return bool(re.search(self.says, text, re.DOTALL)) and bool(re.search(self.code, code))


_VALUES = r"data-dependent|DataDependent"
_CHECK = "take the check out of forward, or skip it while tracing: `if not torch.compiler.is_exporting(): ...`"
REASONS = (
    Reason(
        "numpy computes outside of torch, where nothing can be traced or differentiated",
        "use torch's function of the same name (torch.tanh for np.tanh), without .numpy()",
        r"\.numpy\(\)|[Nn]um[Pp]y",
    ),
    Reason(
        "the values of a tensor become Python numbers",
        "keep them a tensor: .tolist() and list() have no traced form",
        code=r"\.tolist\(|\blist\(",
    ),
    Reason("an assertion looks at the values of tensors", _CHECK, _VALUES, r"\bassert\b|_assert"),
    Reason("a check raises an error depending on the values of tensors", _CHECK, _VALUES, r"\bif\b.*:\s*raise\b"),
    Reason(
        "the length of a sequence is a value of a tensor",
        "run on the padded batch and mask what is padding",
        code=r"pack(ed)?_(padded_)?sequence|pad_packed",
    ),
    Reason(
        "a Python number is made from the value of a tensor",
        "keep it a tensor: multiply by the tensor itself, index by torch.gather or a one-hot mask, and fix sizes and counts "
        "in __init__",
        r"specialized integer|expression (?:TruncToInt\()?-?zu?f?\d+\)?(?: |$)|expression zuf\d+|_local_scalar_dense",
    ),
    Reason(
        "control flow depends on the values of tensors",
        "use torch.where(condition, a, b) with one condition per sample, or move the decision out of forward",
        _VALUES,
    ),
    Reason(
        "the batch size is fixed in a shape",
        "write x.view(x.size(0), ...), x.reshape(x.size(0), ...) or x.flatten(1) instead of a number",
        r"shape '.*' is invalid for input of size .*s\d",
    ),
    Reason(
        "an operator of the user's own has no rule for shapes",
        "register one: @my_op.register_fake, a function that returns an empty tensor of the output's shape",
        r"no fake impl|register_fake",
    ),
    Reason(
        "an operator cannot be traced without values",
        "use another operator: dense tensors instead of sparse ones, or a torch.library.custom_op with register_fake",
        r"UnsupportedOperator",
    ),
    Reason(
        "gradients are computed inside forward",
        "write the derivative out, or compute it outside of the model",
        r"fake tensor in the exported program|autograd|requires_grad",
        search=r"autograd\.grad|\.backward\(|func\.(jac|grad|vjp|jvp)",
    ),
    Reason(
        "a tensor is written through .data, behind torch's back",
        "compute a new tensor instead",
        r"fake tensor in the exported program",
        search=r"\.data\b",
    ),
    Reason(
        "forward writes to a tensor that is no buffer",
        "compute a new tensor instead: a reversed network must not change state",
        r"is mutated in the forward",
        search=r"\.(add|mul|copy|sub|div|fill|zero|index_add|scatter)_\(|\]\s*[-+*/]?=[^=]|\bself\.\w+\s*[-+*/]=",
        sure=True,
    ),
    Reason(
        "quantised weights are packed",
        "trace the float model, before it is quantised",
        r"quantized|PackedParams",
    ),
    Reason(
        "a part is compiled by torch.jit, which torch.export does not look into",
        "put the Python module in its place",
        r"ScriptModule|ScriptMethod|torch\.jit",
    ),
    Reason(
        "something reads a tensor's memory: copy.deepcopy, data_ptr or a kernel of its own",
        "copy in __init__; wrap a kernel in torch.library.custom_op with register_fake",
        r"data pointer",
    ),
)
_HIDDEN = Reason(
    "a tensor is written behind torch's back (.data), or gradients are computed inside forward (torch.autograd.grad)",
    "compute a new tensor, and write the derivative out",
    "fake tensor in the exported program",
)
_UNKNOWN = Reason("torch.export cannot follow this code", "keep to tensor operations inside forward")


def explain(model: nn.Module, error: Exception) -> str:
    """An export that failed although the model runs: the reason, the line, the rewrite, and what torch said."""
    text = f"{type(error).__name__}: {error}"
    place = of_traceback(model, error)
    scripted = next((m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        text += " (ScriptModule)"
        place = place if place.file else Place(module=module_of(model, scripted))
    code = place.code.partition("#")[0].strip()
    following = linecache.getline(place.file, place.line + 1).strip() if code.endswith(":") else ""
    code += f" {following}" if following.startswith("raise") else ""
    for reason in REASONS:
        if reason.fits(text, code):
            found = find_line(model, reason.search) if reason.search and not place.file else place
            if found.file or not reason.search or reason.sure:
                place = found
                break
    else:
        reason = _HIDDEN if _HIDDEN.fits(text, "") else _UNKNOWN
    return _sentence(model, reason, place, text, "torch.export said")


_ON_EXAMPLE = (
    Reason(
        "tensors lie on different devices",
        "move the example and the whole model to one device, and create tensors in forward with device=x.device",
        r"same device|expected device|linked with support|different devices|meta",
    ),
    Reason(
        "the dtype of the example does not fit the weights",
        "give it the dtype of the weights (example.float()), token indices as int64 (example.long())",
        r"same dtype|scalar type|dtype",
    ),
)


def on_example(model: nn.Module, error: Exception, shapes: str, samples: int, unbatched: bool, alone: bool) -> str:
    """A model that itself fails on so many samples of the example.

    Args:
        shapes: of the example. samples: how many were run. unbatched: whether the example works as one sample of a batch.
        alone: whether the model runs on the example as it is.
    """
    place, text = of_traceback(model, error), f"{type(error).__name__}: {error}"
    hint = "; the model does run on example[None]: is the batch dimension missing" if unbatched and not alone else ""
    if unbatched and alone:
        reason = Reason(
            f"the example {shapes} lacks its batch dimension", "give a batch: example[None] for a single sample"
        )
    elif alone:
        reason = Reason(
            f"the batch size is fixed inside forward: it runs on the example {shapes}, not on {samples} samples of it",
            "write x.view(x.size(0), ...), x.reshape(x.size(0), ...) or x.flatten(1) instead of a number",
        )
    elif re.match(r"raise\b", place.code):
        mode = ", and the network is traced in eval mode" if looks_at_training(model) else ""
        reason = Reason(
            f"forward raises {type(error).__name__} itself{mode}", "run model.eval()(example) first; it has to return"
        )
    else:
        reason = next(
            (r for r in _ON_EXAMPLE if r.fits(text, "") and not hint),
            Reason(
                f"forward fails on the example {shapes}",
                f"check its shape (the first dimension is the batch) and type, and run model.eval()(example) first{hint}",
            ),
        )
    return _sentence(model, reason, place, text, "The model said")


_ON_BATCH = (
    Reason("the values of a tensor become Python numbers", "keep them a tensor", code=r"\.tolist\(|\blist\("),
    Reason(
        "",
        "work on the whole batch at once: torch operators do, and torch.vmap makes those that do not",
        code=r"\bfor\b",
    ),
    Reason(
        "",
        "write x.shape[0] instead of len(x), and torch.sym_float(x.shape[0]) instead of float(x.shape[0])",
        code=r"\blen\(",
    ),
    Reason(
        "",
        "compute with x.shape[0] by + - * / // and **, which torch follows, instead of by functions of Python",
        code=r"\bmath\.|\b(int|float|round)\(",
    ),
    Reason("", "let forward do the same for every batch size", code=r"\b(if|while|assert|max|min)\b"),
    Reason("", "split, pair or fold along another dimension than the batch", code=r"chunk|split|\[::|//"),
)
_SHAPE = Reason("", "write x.view(x.size(0), ...) or x.flatten(1) instead of a number")


def on_batch(model: nn.Module, error: Exception, assumption: str, place: Place) -> str:
    """A model that takes the batch size for a number, or goes another way for some batch sizes.

    Args:
        assumption: what torch had to assume of the size n, and where; empty where it did not say.
    """
    fixed = not assumption or (assumption.startswith("Eq(") and "Mod(" not in assumption)
    why = (
        "the batch size is fixed inside forward"
        if fixed
        else f"forward holds only for a batch size n with {assumption}"
    )
    known = next((r for r in _ON_BATCH if r.fits("", place.code.partition("#")[0])), _SHAPE)
    return _sentence(
        model, Reason(known.why or why, known.rewrite), place, f"{type(error).__name__}: {error}", "torch.export said"
    )


def on_state(model: nn.Module) -> str:
    """A model whose second call gives something else than its first."""
    assigned = r"\bself\.[\w.]+(\[.*\])?\s*([-+*/]|//|\*\*)?=[^=]"
    changed = r"\bself\.[\w.]+\.(append|extend|update|insert|pop|\w+_)\("
    place = find_line(model, f"{assigned}|{changed}")
    return (
        f"{type(model).__name__} cannot be reversed: a second call on the same input gives another output, so forward keeps "
        f"state or draws random numbers{place}. Usual rewrite: pass the state as an input and return it, or compute it anew in "
        "each call"
    )


def on_other_output(model: nn.Module) -> str:
    """A model that gives something else than what was traced."""
    return (
        f"{type(model).__name__} cannot be reversed: what was traced gives another output than the model itself, so forward "
        "depends on something that is no input (the time, random numbers of Python or numpy, a global variable). Usual "
        "rewrite: make it an input or a buffer"
    )


def is_of_batch(error: Exception) -> bool:
    """Whether an export failed because the batch size does not stay free."""
    return bool(re.search(r"Constraints? violated|marked batch", str(error)))


def looks_at_training(model: nn.Module) -> bool:
    """Whether forward branches on training mode."""
    return bool(find_line(model, r"\bself\.training\b").file)


def _sentence(model: nn.Module, reason: Reason, place: Place, text: str, who: str) -> str:
    said = text.strip().splitlines()[0]
    return f"{type(model).__name__} cannot be exported: {reason.why}{place}. Usual rewrite: {reason.rewrite}. ({who}: {said})"
