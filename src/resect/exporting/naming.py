"""Functions by name, "module:function", as the command line and saved directories give them."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resect.errors import ModelError, ResectError


def named_function(spec: str, *, error: type[ResectError] = ModelError) -> Callable[..., Any]:
    """The function that "module:function" names; modules beside the working directory are found too.

    `error` is raised, with the nearest name, where there is no such module or function.

    >>> named_function("math:sqrt")(9.0)
    3.0
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise error(f"{spec!r} is not of the form module:function, for example mynetwork:make.")
    module = _imported(module_name, spec, error)
    function = getattr(module, function_name, None)
    if function is None:
        raise error(f"module {module_name!r} has no {function_name!r}.{nearest(function_name, dir(module))}")
    return function


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence that offers the nearest of the `known` names, or nothing where none is near.

    >>> nearest("digit", ["digits", "mnist"])
    " Did you mean 'digits'?"
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _imported(module_name: str, spec: str, error: type[ResectError]) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name and (module_name == missing.name or module_name.startswith(missing.name + ".")):
            files = [path.stem for path in Path(here).glob("*.py")]
            raise error(f"no module {module_name!r} (from {spec!r}) here or installed.{nearest(module_name, files)}") from None
        raise error(f"{spec!r} needs the package {missing.name!r}, which is not installed.") from missing
    except Exception as failure:
        raise error(f"importing {module_name!r} (from {spec!r}) failed: {type(failure).__name__}: {failure}") from failure
    finally:
        sys.path.remove(here)
