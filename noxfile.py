"""Every environment that is supported, made anew and tested: `make test-versions`, or `nox --session newest`.

Sessions are made with uv, which keeps a version of a package on disk once, however many environments have it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

PYTHON = "3.11"
PYTEST = ("hypothesis>=6.131", "pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6")
TOOLS = ("jsonargparse[signatures]>=4.35", *PYTEST)
TOGETHER = ("cvxpylayers", "easyfsl", "lightning", "moreau", "numba", "pretrained", "sklearn", "text")
"""The extras that go with NumPy 2."""
MODELS = ("images", "timm", "hf", "open-clip", "sentence-transformers")
"""The extras that load models for the features of files."""
LEARN2LEARN = ("--config-settings-package", "learn2learn:--build-option=build_ext")
PEERS = (
    (
        "easyfsl",
        "https://github.com/sicara/easy-few-shot-learning",
        "v1.5.0",
        ("easyfsl/tests/methods/prototypical_networks_test.py", "easyfsl/tests/samplers/task_sampler_test.py"),
    ),
    (
        "learn2learn",
        "https://github.com/learnables/learn2learn",
        "v0.2.0",
        ("tests/unit/nn/metaoptnet_test_notravis.py", "tests/unit/nn/protonet_test.py"),
    ),
)
"""Name, repository, version and those tests that do not train on data to be downloaded."""
EXTRAS = ("tests/integration/test_extras.py", "tests/integration/test_imports.py")
"""What is tested with one extra, or with none; all of the tests run in `lowest` and `newest`."""


@nox.session(python=PYTHON)
@nox.parametrize("lightning", [False, True], ids=["all-but-lightning", "lightning"])
def lowest(session: nox.Session, lightning: bool) -> None:
    """The oldest versions that pyproject.toml allows, with NumPy 1.26; Lightning with a newer torch than the others."""
    extras = {"lightning"} if lightning else {*TOGETHER, "qpth"} - {"lightning"}
    install(session, "--resolution", "lowest-direct", f".[{','.join(sorted(extras))}]", "numpy>=1.26,<2")
    check(session, *(["tests/integration/test_lightning.py", EXTRAS[0]] if lightning else ["tests"]))


@nox.session(python=PYTHON)
def newest(session: nox.Session) -> None:
    """The newest versions that pyproject.toml allows, with NumPy 2 and hence without qpth."""
    install(session, "--upgrade", f".[{','.join(TOGETHER)}]", "numpy>=2", "beartype>=0.20")  # which checks shapes
    noise = "ignore:__array__ implementation:DeprecationWarning"  # of cvxpylayers 1.2, on NumPy 2
    check(session, "tests", "-W", noise)


@nox.session(python=PYTHON)
@nox.parametrize("torch", ["lowest", "newest"], ids=["lowest", "newest"])
def core(session: nox.Session, torch: str) -> None:
    """Torch, jaxtyping and nothing else: not even NumPy."""
    install(session, "--resolution", "lowest-direct" if torch == "lowest" else "highest", ".")
    check(session, "tests/unit", *EXTRAS)


@nox.session(python=PYTHON)
@nox.parametrize("name", [*TOGETHER, "learn2learn", "qpth"], ids=[*TOGETHER, "learn2learn", "qpth"])
def extra(session: nox.Session, name: str) -> None:
    """One extra alone: what needs it runs, all else says what is missing."""
    install(session, *(LEARN2LEARN if name == "learn2learn" else ()), f".[{name}]")
    check(session, *EXTRAS)


@nox.session(python=PYTHON)
def models(session: nox.Session) -> None:
    """Models of other packages as features of files."""
    install(session, f".[text,{','.join(MODELS)}]")
    check(session, "tests/integration/test_feature_models.py", "tests/integration/test_command.py", *EXTRAS)


@nox.session(name="drop-ins", python=PYTHON)
def drop_ins(session: nox.Session) -> None:
    """The examples with heads in the place of other libraries' classifiers."""
    install(session, ".[sklearn,open-clip]", "mteb>=2", "setfit>=1.2")
    check(session, "tests/integration/test_drop_ins.py")


@nox.session(python=PYTHON)
def peers(session: nox.Session) -> None:
    """The tests of easyfsl and learn2learn, with our heads in the place of their classifiers.

    Their repositories are cloned, or are in the folder that is given: `nox --session peers -- FOLDER`.
    """
    install(session, *LEARN2LEARN, ".[learn2learn,easyfsl]")
    clones = Path(session.posargs[0] if session.posargs else session.create_tmp()).resolve()
    for name, url, version, tests in PEERS:
        if not (clones / name).exists():
            with session.chdir(clones):
                session.run("git", "clone", "--quiet", "--depth", "1", "--branch", version, url, name, external=True)
        with session.chdir(clones / name):
            session.run(
                *("python", "-P", "-m", "pytest", "-p", "substitutes", "-p", "no:cacheprovider"),
                *("--import-mode", "importlib", *tests),
                env={"PYTHONPATH": str(Path(__file__).parent / "tests" / "peers")},
            )


@nox.session(python=PYTHON, venv_backend="venv", default=False)
@nox.parametrize("name", ["", *nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]])
def pip(session: nox.Session, name: str) -> None:
    """An install line, by the pip that Python brings, without a cache; the environment is removed afterwards."""
    own = ["--use-pep517", "--config-settings=--build-option=build_ext", name] if name == "learn2learn" else []
    session.env["PIP_NO_CACHE_DIR"] = "1"
    try:
        session.run("python", "-m", "pip", "install", *own, f".[{name}]" if name else ".")
        if name == "bench":
            session.run("python", "-m", "benchmarks.solvers", "--help", silent=True)
            small = ("--steps", "2", "--validation-episodes", "20", "--test-episodes", "20", "--threads", "1")
            session.run("python", "-m", "benchmarks.train", *small, "--output", session.create_tmp())
        session.install(*TOOLS)
        check(session, *EXTRAS)
    finally:
        shutil.rmtree(session.virtualenv.location)


def install(session: nox.Session, *arguments: str) -> None:
    """Install packages, and then the tools in whatever version goes with them."""
    session.env["UV_COMPILE_BYTECODE"] = "1"  # as pip does; or what Python warns of then is an error in the tests
    session.install(*arguments)
    session.install(*TOOLS)


def check(session: nox.Session, *arguments: str) -> None:
    """Run pytest on the installed packages, whose versions come first."""
    tool = ("uv", "pip") if session.venv_backend == "uv" else ("python", "-m", "pip")
    session.run(*tool, "check", external=True)
    session.run(*tool, "list", "--format", "freeze", external=True)
    session.run(
        *("python", "-m", "pytest", "--without-extras", *arguments, "--ignore=tests/docs"),  # which need everything
        *("--override-ini", "cache_dir=.nox/.pytest_cache", "-W", "ignore:Failed to initialize NumPy"),
        *session.posargs,
        env={"OMP_NUM_THREADS": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"},  # of old Lightning, about itself
    )
