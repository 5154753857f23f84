"""What pyproject.toml cannot say: configs/ is also part of the package, and a wheel carries the commit that it was built from."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

sys.path.insert(0, str(Path(__file__).parent))
from wan_mlperf import identity  # needs the standard library only


class BuildPy(build_py):
    """Adds wan_mlperf/COMMIT; an editable install asks git."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "wan_mlperf", identity.FILE.name).write_text(identity.commit() + "\n")


class Sdist(sdist):
    """Adds wan_mlperf/COMMIT, for a wheel that is built from it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "wan_mlperf", identity.FILE.name).write_text(identity.commit() + "\n")


setup(
    packages=[*find_packages(include=["wan_mlperf*", "sut*"]), "wan_mlperf.configs"],
    package_dir={"wan_mlperf.configs": "configs"},
    package_data={"": ["**/*"]},
    exclude_package_data={"": ["**/__pycache__/*", "**/*.pyc"]},
    cmdclass={"build_py": BuildPy, "sdist": Sdist},
)
