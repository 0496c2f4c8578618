"""For tools that still ask for it: everything is in pyproject.toml."""

import setuptools

setuptools.setup()
