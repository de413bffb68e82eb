"""Audit the pinned packages for known vulnerabilities, by pip-audit in its own environment.

Exits with 1 if there are any; with 0 and a message if pip-audit or its data cannot be reached.
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
    return report(packages)


def report(packages: list[dict]) -> int:
    """Print the vulnerabilities, and how many packages could not be audited."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, fault) for package in packages for fault in package.get("vulns", [])]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    audited = len(packages) - len(skipped)
    print(
        f"{audited} packages audited, {len(skipped)} not known to the database,"
        f" {len(found)} vulnerabilities"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
