"""Tasks of the workspace; ``python -m nox -l`` lists them.

The sessions share one environment, .nox/shared, so that torch is installed once. A
distribution whose requirements the pins do not meet gets an environment of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["check", "tests", "lint", "codegen"]
nox.options.default_venv_backend = "virtualenv"  # uv leaves out pip, and has settings of its own

ROOT = Path(__file__).parent
HARNESS = ROOT / "harness"
DISTRIBUTIONS = [path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))] + [HARNESS]
SOURCES = [str(distribution / "src") for distribution in DISTRIBUTIONS]
RESULTS = ROOT / "results"
NOTHING_JUDGED = 3  # exit status of ``attnproof check``


def project(distribution: Path) -> dict:
    """The [project] table of a distribution."""
    return tomllib.loads((distribution / "pyproject.toml").read_text("utf-8"))["project"]


def group(*names: str) -> list[str]:
    """The requirements of dependency groups of the root pyproject."""
    return nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), *names)


def meets_pins(distribution: Path) -> bool:
    """Whether the pinned versions are among those that the distribution accepts."""
    pins = {pin.name: pin for pin in map(Requirement, group("pins"))}
    for requirement in map(Requirement, project(distribution).get("dependencies", [])):
        for exact in pins[requirement.name].specifier if requirement.name in pins else ():
            if exact.operator == "==" and not requirement.specifier.contains(exact.version):
                return False
    return True


# Every backend that a package registers, with the package that it comes from.
BACKENDS = {
    name: distribution
    for distribution in DISTRIBUTIONS
    for name in project(distribution).get("entry-points", {}).get("attnproof.backends", {})
}
SHARED = [distribution for distribution in DISTRIBUTIONS if meets_pins(distribution)]


class Environment:
    """A virtual environment that several sessions use, filled again when what it needs changes."""

    def __init__(self, session: nox.Session, distribution: Path = HARNESS) -> None:
        self.session = session
        if distribution in SHARED:
            self.home = ROOT / ".nox" / "shared"
            packages, requirements = SHARED, group("pins", "test", "lint")
        else:
            self.home = ROOT / ".nox" / distribution.name
            packages, requirements = [distribution, ROOT / "packages/reference", HARNESS], []
        self.bin = self.home / ("Scripts" if os.name == "nt" else "bin")
        self.install(packages, requirements)

    def install(self, packages: list[Path], requirements: list[str]) -> None:
        """Install unless the same was installed before: the packages, editable, in one command."""
        editable = [word for package in packages for word in ("--editable", str(package))]
        wanted = "\n".join(
            [sys.version, *requirements, *editable]
            + [(package / "pyproject.toml").read_text("utf-8") for package in packages]
        )
        digest = hashlib.sha256(wanted.encode()).hexdigest()
        stamp = self.home / "installed.sha256"
        if stamp.exists() and stamp.read_text("utf-8") == digest:
            return
        self.session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(self.home))
        # Most modules of torch are never imported: compiling them all takes longer than unpacking.
        self.run(
            "python", "-m", "pip", "install", "--quiet", "--no-compile", *requirements, *editable
        )
        stamp.write_text(digest, "utf-8")

    def run(self, program: str, *arguments: object, **options: object) -> None:
        """Run a program of this environment."""
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", "")])
        words = [str(argument) for argument in arguments]
        # Nothing was compiled at installation: what is imported must be kept compiled.
        env = {"PATH": path, "PYTHONDONTWRITEBYTECODE": None}
        self.session.run(str(self.bin / program), *words, env=env, **options)


@nox.session(venv_backend="none")
def check(session: nox.Session) -> None:
    """Judge every backend that can run here, and print the table."""
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir()
    environments = {name: Environment(session, home) for name, home in BACKENDS.items()}
    programs = [f"{name}={environments[name].bin / 'attnproof'}" for name in BACKENDS]
    shared = Environment(session)
    shared.run("python", "tools/check_all.py", RESULTS, *programs, "--", *session.posargs)
    shared.run("python", "tools/backend_table.py", RESULTS, "--judge")


@nox.session(venv_backend="none", default=False)
@nox.parametrize("name", [nox.param(name, id=name) for name in BACKENDS])
def backend(session: nox.Session, name: str) -> None:
    """Judge one backend; what follows -- goes to ``attnproof check``."""
    RESULTS.mkdir(exist_ok=True)
    judge(session, name, BACKENDS[name], success_codes=[0, NOTHING_JUDGED])
    result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    if result["summary"]["exit_status"] == NOTHING_JUDGED:
        session.skip("nothing could be judged here; the reason is printed above")


def judge(session: nox.Session, name: str, distribution: Path, success_codes: list[int]) -> None:
    """Run ``attnproof check`` on a registered backend; its results go to results/NAME.json."""
    words = ["check", name, "--json", RESULTS / f"{name}.json", *session.posargs]
    Environment(session, distribution).run("attnproof", *words, success_codes=success_codes)


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Judge every backend that the GPU can run, on the chapters and the golden vectors, and test
    its kernels there; JSON, JUnit and a summary go to results/.

    In the environment that is active, not in one of nox: it has torch with CUDA, and the
    distributions of this repository installed. What follows -- are parts of tools/gpu.sh, which
    says what the variables BACKENDS, LEVEL and MUST_RUN mean.
    """
    found = session.run(
        "python", "-c", "import torch; print(torch.cuda.is_available())", silent=True, external=True
    )
    if str(found).strip() != "True":
        session.error("torch finds no CUDA device here, or is not installed in this environment")
    session.run("bash", "tools/gpu.sh", str(RESULTS / "gpu"), *session.posargs, external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the unit tests, all but the slow ones; what follows -- goes to pytest in their place."""
    Environment(session).run("pytest", *(session.posargs or ["-n", "auto", "-m", "not slow"]))


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Run ruff and mypy."""
    environment = Environment(session)
    environment.run("ruff", "check", ".")
    environment.run("ruff", "format", "--check", ".")
    environment.run("mypy", *SOURCES)


@nox.session(venv_backend="none", default=False)
def golden(session: nox.Session) -> None:
    """Recompute the checked-in truth and compare; ``-- update`` rewrites what changed."""
    Environment(session).run("attnproof", "golden", *(session.posargs or ["verify"]))


@nox.session(venv_backend="none")
def codegen(session: nox.Session) -> None:
    """Compile the kernels for GPUs that need not be there, and compare with golden/codegen."""
    Environment(session).run("attnproof", "golden", "verify", "golden/codegen")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning is an error."""
    session.install(*group("docs"))
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "-b", "html", "docs", "site")


@nox.session(venv_backend="none", default=False)
def readme(session: nox.Session) -> None:
    """Print the outputs that README.md and docs/ show once more, from what commands say now."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = [page for page in pages if "<!-- output of: " in page.read_text("utf-8")]
    Environment(session).run("python", "tools/readme.py", *shown)


@nox.session(default=False)
def packages(session: nox.Session) -> None:
    """Build a wheel of every distribution, and install and import each without its siblings."""
    folder = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    session.install(*group("pins"))
    local = [str(distribution) for distribution in DISTRIBUTIONS]
    session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *local)
    wheels = {path.name.split("-")[0].replace("_", "-"): str(path) for path in folder.iterdir()}
    for distribution in DISTRIBUTIONS:  # the harness, which needs more than torch, comes last
        described = project(distribution)
        needed = [Requirement(text).name for text in described.get("dependencies", [])]
        chosen = [wheels[name] for name in (described["name"], *needed) if name in wheels]
        session.run("pip", "uninstall", "--quiet", "--yes", *wheels)
        session.install(*group("pins"), *chosen)
        session.run("pip", "check")
        session.run("python", "tools/import_all.py", str(distribution))
