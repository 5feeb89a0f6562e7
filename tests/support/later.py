"""Modules that are imported when they are first used: every process of a test run reads every file of tests."""

import importlib


class Later:
    """In place of `import NAME`; an attribute is set on the module itself, not on this."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):                       # pytest asks every object of a file for some of those
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
