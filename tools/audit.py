"""Audit the pinned packages for known vulnerabilities with pip-audit in a temporary environment.

Exits with 1 if there are any, with 0 and a message if pip-audit or its data are not available.
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
        result = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (result.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        print(f"not audited: {reason}", file=sys.stderr)
        return 0
    return report(packages)


def report(packages: list[dict]) -> int:
    """Print the vulnerabilities and how many packages could not be audited; the exit code."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    vulnerable = [(package, entry) for package in packages for entry in package.get("vulns", [])]
    for package, entry in vulnerable:
        fixed = ", ".join(entry["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {entry['id']}, fixed in {fixed}")
    audited = len(packages) - len(skipped)
    print(
        f"{audited} packages audited, {len(skipped)} not known to the database,"
        f" {len(vulnerable)} vulnerabilities"
    )
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
