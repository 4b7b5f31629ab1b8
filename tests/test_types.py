"""What users write against the zoo passes a type checker, and so does the zoo."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", "kernels/README.md", "zoo/README.md", "lra/README.md")


def test_zoo_and_examples_have_no_type_errors(tmp_path):
    package, examples = tmp_path / "subquad", tmp_path / "examples"
    package.mkdir()
    examples.mkdir()
    for path in (ROOT / "kernels", ROOT / "zoo", ROOT / "lra", *(ROOT / "subquad").iterdir()):
        (package / path.name).symlink_to(path)
    (examples / "__init__.py").touch()
    for page in PAGES:
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)):
            (examples / f"{re.sub('[/.]', '_', page)}_{i}.py").write_text(block)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command += ["--package", "subquad.zoo", "--package", "examples"]
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
