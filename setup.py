"""All else is in pyproject.toml; this puts the course's files into the wheel, as qlora_lab/places.py expects them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("data", "docs", "examples", "notebooks")
LEFT_OUT = ("source", "solutions", "undeclared.json", "runs", "__pycache__", ".ipynb_checkpoints")


class BuildWithCourse(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the files of the checkout are used
            return
        course = Path(self.build_lib) / "qlora_lab" / "course"
        shutil.rmtree(course, ignore_errors=True)  # of an earlier build
        for name in SHIPPED:
            shutil.copytree(name, course / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for path in [*Path().glob("notebooks/source/*/*.labels.json"), *Path().glob("notebooks/source/*/edition.json")]:
            (course / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, course / path)  # what the lessons' code says in other languages


setup(cmdclass={"build_py": BuildWithCourse})
