"""Build hook: a wheel holds the recipes and the digits teacher, which a clone keeps outside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = {  # where distill/config/recipes.py looks for them: (source, patterns)
    "distill/shipped_configs": ("configs", ("**/*.yaml", "**/*.json")),
    "distill/shipped_checkpoints/digits-teacher": ("checkpoints/digits-teacher", ("**/*",)),
}


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for target, (source, patterns) in SHIPPED.items():
            files = [file for pattern in patterns for file in (ROOT / source).glob(pattern) if file.is_file()]
            for file in files:
                copy = Path(self.build_lib, target, file.relative_to(ROOT / source))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithRecipes})
