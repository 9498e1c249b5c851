"""pip's build: setuptools', and the native CPU calls compiled where there is a C++ compiler.

Without one, or where compiling fails, the package is built all the same: its kernels are XLA's then, and the first run says so.
"""

import importlib.util
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

_KERNELS = Path("dancemoe_jax") / "kernels"


def _build():
    """dancemoe_jax/kernels/build.py, without the packages around it, which import JAX."""
    spec = importlib.util.spec_from_file_location("kernels_build", _KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_requires_for_build_wheel(config_settings=None):
    """jaxlib brings the headers."""
    more = [_jaxlib()] if _build().find_compiler() else []
    return [*build_meta.get_requires_for_build_wheel(config_settings), *more]


def _jaxlib():
    import tomllib

    wanted = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    return next(line.replace("jax", "jaxlib", 1) for line in wanted if line.startswith("jax>"))


class BuildPy(build_py):
    def run(self):
        super().run()
        kernels, compiler = _build(), _build().find_compiler()
        if self.editable_mode or compiler is None:
            return
        include = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
        try:
            kernels.build(Path(self.build_lib).absolute() / _KERNELS / kernels.LIBRARY, str(include), compiler)
        except (kernels.BuildError, OSError) as error:
            self.warn(f"native CPU calls were not built: {error}")


class BdistWheel(bdist_wheel):
    """The wheel is for this platform where it holds a library, and for any Python 3: nothing links against Python."""

    def finalize_options(self):
        compiled = _build().find_compiler() is not None
        self.distribution.has_ext_modules = lambda: compiled  # what makes setuptools call a wheel one platform's
        super().finalize_options()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class Sdist(sdist):
    def add_defaults(self):
        super().add_defaults()
        self.filelist.append(".build/backend.py")
