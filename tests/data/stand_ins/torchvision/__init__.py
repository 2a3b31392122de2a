"""Stands in for torchvision: vLLM's modules of models that can take images import it, also where none is ever given."""

import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

__version__ = "0.0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__getattr__": lambda self, each: each})()


class _Anything(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        return __getattr__(name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname, path, target=None):
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("torchvision.") else None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
