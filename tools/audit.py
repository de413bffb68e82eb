"""Known vulnerabilities of the pinned packages, by pip-audit in an environment of its own: `python
tools/audit.py`.

Leaves with 1 where there are some. Where pip-audit's data cannot be reached nothing was audited:
that is said, and leaves with 0.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder) / "bin"
        if subprocess.run([programs / "pip", "install", "--quiet", "pip-audit"]).returncode:
            print("not audited: pip-audit cannot be installed here", file=sys.stderr)
            return 0
        command = [
            programs / "pip-audit",
            "--no-deps",
            "--disable-pip",
            "--progress-spinner=off",
            "--format=json",
            "--requirement",
            PINS,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(
            f"not audited: {(done.stderr.strip().splitlines() or ['pip-audit says nothing'])[-1]}",
            file=sys.stderr,
        )
        return 0
    return told(packages)


def told(packages: list[dict]) -> int:
    """Print what was found, and how many packages nothing is known of."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, fault) for package in packages for fault in package.get("vulns", [])]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, mended in {fixed}")
    audited = len(packages) - len(skipped)
    print(
        f"{audited} packages audited, {len(skipped)} of which nothing can be learned here,"
        f" {len(found)} vulnerabilities"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
