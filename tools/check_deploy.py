"""Check the files of deploy/ for form, each by the program that reads it: `make deploy`.

hadolint reads the Dockerfile, `docker compose config` compose.yaml, Helm the chart, whose objects
Kubernetes' schemas then describe, and systemd-analyze the unit, where systemd is installed. Needs
tools/deploy.txt; no daemon and no cluster. Exit code 1 if anything is wrong.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[1] / "deploy"
CHART = DEPLOY / "helm" / "hydra-llm"
UNIT = DEPLOY / "hydra-llm.service"
SECRETS = ("admin_key", "openai_api_key", "database_password")
KUBERNETES = "1.34"
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "all": {
        "image": {"tag": "full"},
        "settings": {"workers": 2, "root_path": "/llm", "proxy": "10.0.0.0/8"},
        "bundle": {"existingClaim": "bundles", "path": "my-bundle"},
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls"},
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "a file for several pods": {"store": "sqlite:///s.db"},
    "a misspelt value": {"replica": 2},
}


def run(*command: str | Path, **options: Any) -> str:
    """The faults that a program finds, as it says them; empty if there are none."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    said = (done.stderr + done.stdout).strip()
    return (said or f"exit code {done.returncode}") if done.returncode else ""


def dockerfile() -> Iterator[str]:
    yield run(Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile")


def compose() -> Iterator[str]:
    """With secrets as its comment makes them, and for both images."""
    spec = find_spec("compose")
    program = Path(str(spec and spec.origin)).with_name("docker-compose")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(DEPLOY / "compose.yaml", folder)
        secrets = Path(folder) / "secrets"
        secrets.mkdir()
        for name in SECRETS:
            (secrets / name).touch()
        for tag in ("slim", "full"):
            told = {**os.environ, "HYDRA_LLM_TAG": tag}
            yield run(program, "config", "--quiet", cwd=folder, env=told)


def chart() -> Iterator[str]:
    """Each set of values renders to objects that Kubernetes knows; bad values are refused."""
    import helm_python
    import kubernetes_validate
    import yaml

    loaded = helm_python.Chart.load(CHART)
    for name, values in VALUES.items():
        report = helm_python.lint(CHART, values, strict=True)
        yield "; ".join(f"values '{name}': {error}" for error in report["errors"])
        kinds = set()
        for path, text in loaded.render(values, name="release", namespace="here").items():
            for item in yaml.safe_load_all(text) if path.endswith(".yaml") else ():
                if item is None:
                    continue
                kinds.add(item["kind"])
                try:
                    kubernetes_validate.validate(item, KUBERNETES, strict=True)
                except kubernetes_validate.ValidationError as error:
                    yield f"values '{name}': {path}: {error.message}"
        expected = {"Deployment", "Job", "Service", "PodDisruptionBudget"}
        expected |= {"Ingress"} if name == "all" else set()
        yield "" if kinds == expected else f"values '{name}': objects {sorted(kinds)}"
    for what, values in REFUSED.items():
        try:
            loaded.validate_schema(values)
        except helm_python.HelmError:
            continue
        yield f"values.schema.json lets pass {what}"


def unit() -> Iterator[str]:
    """With a program that is there."""
    if not shutil.which("systemd-analyze"):
        print("systemd is not installed: the unit is not checked", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / UNIT.name
        text = UNIT.read_text(encoding="utf-8")
        file.write_text(text.replace("/opt/hydra-llm/bin/hydra-llm", "/bin/true"))
        command = ["systemd-analyze", "verify", "--man=no", file]
        yield subprocess.run(command, capture_output=True, text=True).stderr.strip()


def main() -> None:
    faults = 0
    for check in (dockerfile, compose, chart, unit):
        found = [fault for fault in check() if fault]
        print(f"{check.__name__}: {'; '.join(found) or 'ok'}")
        faults += len(found)
    sys.exit(int(faults > 0))


if __name__ == "__main__":
    main()
