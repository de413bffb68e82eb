"""Build the source distribution, unpack it in an empty folder, and run its tests there.

    python tools/try_sdist.py [PYTEST ARGUMENT ...]

The tests import the package from the unpacked tree, with the libraries of this environment; there
is no git. By default the fast tests of SUBSET run; `.` runs all. Exit code 1 if anything fails.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUBSET = (
    "tests/test_packaging.py",
    "tests/test_conventions.py",
    "tests/test_links.py",
    "tests/test_config.py",
    "tests/test_history.py",
    "tests/test_plugins.py",
    "tests/test_retrieve.py",
    "tests/datasets",
    "tests/tasks",
)
FAST = ("-m", "not slow and not llm", "--hypothesis-profile", "fast")
SHOWN = "import hydra_llm; print(hydra_llm.__file__, hydra_llm.__version__)"


def unpacked(folder: Path) -> Path:
    """The tree of the source distribution, built without git."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        files.extractall(folder / "here", filter="data")
    (tree,) = (folder / "here").iterdir()
    return tree


def environment(tree: Path) -> dict[str, str]:
    """The caller's, with the package of the tree, and no git above it."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "GIT_", "PYTHON"))}
    ceiling = str(tree.parent)
    return {**ours, "PYTHONPATH": str(tree / "src"), "GIT_CEILING_DIRECTORIES": ceiling}


def main() -> None:
    arguments = sys.argv[1:] or [*SUBSET, *FAST]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hydra-llm-sdist-") as temporary:
        tree = unpacked(Path(temporary).resolve())
        env = environment(tree)
        told = subprocess.run(
            [sys.executable, "-c", SHOWN],
            cwd=tree,
            env=env,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        if not told[0].startswith(str(tree)) or tree.name != f"hydra_llm-{told[1]}":
            sys.exit(f"failed: {told} is not of {tree.name}")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        code = subprocess.run(command, cwd=tree, env=env).returncode
    print(f"{tree.name}: tests from the source distribution, {time.monotonic() - began:.0f} s")
    sys.exit(code)


if __name__ == "__main__":
    main()
