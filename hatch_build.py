"""Compiles the CPU kernels into a wheel, so that whoever installs it needs no compiler."""

import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or sys.platform != "linux":
            return
        package = Path(self.root, "src", "gatedffn")
        # There is no PyTorch here, so the packages are entered without their first lines.
        for name, folder in (("gatedffn", package), ("gatedffn.native", package / "native")):
            sys.modules[name] = module = ModuleType(name)
            module.__path__ = [str(folder)]
        from gatedffn.errors import BuildError
        from gatedffn.native.compiler import enabled
        from gatedffn.native.wheel import FOLDER, prebuild

        if not enabled():
            return
        self.folder = tempfile.TemporaryDirectory()  # goes with this object, after the build
        try:
            built = prebuild(package / "ops" / "cpu.cpp", Path(self.folder.name))
        except BuildError as error:
            advice = "GATEDFFN_NATIVE=off builds a wheel without kernels"
            raise BuildError(f"{error}; {advice}") from error
        self.app.display_info(f"compiled {', '.join(path.name for path in built)}")
        target = FOLDER.relative_to(package.parent)
        build_data["force_include"] |= {str(path): str(target / path.name) for path in built}
        build_data["pure_python"] = False
        # Of a processor and a system, and of no Python: the libraries are C's.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
