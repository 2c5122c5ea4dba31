"""The methods. Every file in this folder is one, and registers itself: dropping a file here adds a method.

A method's file may import ``constraint``, ``manifold``, ``linalg`` and ``layout``. Importing this package loads all.
"""

import pkgutil
from importlib import import_module

from stiefel.constraint.catalogue import available, control, get, method_class, register, table

__all__ = ["available", "control", "get", "method_class", "register", "table"]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
