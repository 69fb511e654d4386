"""Whether packages of extras are installed."""

import importlib.util


def is_installed(module: str) -> bool:
    """Return whether a module is installed, without loading it; packages that it belongs to are loaded.

    A folder of its name is no module, though Python imports one that lies in the working directory: ``onnx`` with
    exported files, for example.

    >>> is_installed("torch"), is_installed("no_such_module")
    (True, False)
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that it belongs to
        return False
    return spec is not None and spec.origin is not None
