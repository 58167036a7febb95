"""`scripts/release.sh`, in a repository of its own, and what the workflow for releases builds."""

import datetime
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kvattn

ROOT = Path(__file__).parent.parent
OLD = hf_kvattn.__version__
NEW = f"{int(OLD.split('.')[0]) + 1}.0.10"


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """What the script reads and writes, on a clean main."""
    for name in ("scripts/release.sh", "hf_kvattn/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("## [Unreleased]\n", "## [Unreleased]\n\n- A new line.\n", 1))
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    git(tmp_path, "config", "user.name", "Somebody")
    git(tmp_path, "config", "user.email", "somebody@example.com")
    git(tmp_path, "config", "core.hooksPath", "/dev/null")
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "A change")


def state(folder: Path) -> list[str]:
    return [git(folder, *command) for command in (["rev-parse", "HEAD"], ["tag"], ["diff"], ["status", "--porcelain"])]


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "scripts/release.sh", *arguments], cwd=folder, capture_output=True, text=True)


def test_a_release_sets_the_version_dates_the_changes_and_tags(repository):
    before = (repository / "CHANGELOG.md").read_text()
    done = release(repository, NEW)
    assert done.returncode == 0, done.stderr
    changed = git(repository, "diff", "HEAD~", "--unified=0", "hf_kvattn").splitlines()
    assert [line for line in changed if line[:2] in ("-_", "+_")] == [
        f'-__version__ = "{OLD}"',
        f'+__version__ = "{NEW}"',
    ]
    title = "## [Unreleased]\n\n"
    dated = before.replace(title, f"{title}## [{NEW}] - {datetime.date.today()}\n\n", 1)
    assert (repository / "CHANGELOG.md").read_text() == dated
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "cat-file", "-t", f"v{NEW}") == "tag"  # annotated
    assert git(repository, "rev-list", "-1", f"v{NEW}") == git(repository, "rev-parse", "HEAD")
    assert git(repository, "log", "-1", "--format=%s") == f"Version {NEW}"

    again = release(repository, f"{NEW}0")
    assert (again.returncode, again.stderr) == (
        2,
        "release.sh: CHANGELOG.md says nothing under '## [Unreleased]'\n",
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "not 0 arguments"),
        ([NEW, "now"], "not 2 arguments"),
        *(
            ([wrong], f"version '{wrong}' is not three numbers")
            for wrong in ("", "2", f"v{NEW}", "9.01.0", f"{NEW}rc1")
        ),
        ([f"{NEW}\n9.0.0"], "is not three numbers"),
        ([OLD], f"version {OLD} is not newer than {OLD}"),
        (["0.0.9"], f"version 0.0.9 is not newer than {OLD}"),
    ],
)
def test_a_version_that_cannot_follow_is_refused(arguments, reason, repository):
    before = state(repository)
    done = release(repository, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("release.sh: ") and reason in done.stderr
    assert state(repository) == before


def on_another_branch(repository: Path) -> None:
    git(repository, "switch", "--quiet", "--create", "fix")


def with_a_change(repository: Path) -> None:
    (repository / "CHANGELOG.md").open("a").write("More.\n")


def with_a_new_file(repository: Path) -> None:
    (repository / "notes.txt").write_text("More.\n")


def with_the_tag(repository: Path) -> None:
    git(repository, "tag", f"v{NEW}")


def without_changes(repository: Path) -> None:
    changelog = repository / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n\n## [0.1.0]\n\n- The first version.\n")
    commit(repository)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (on_another_branch, "on main, not on 'fix'"),
        (with_a_change, "not clean:  M CHANGELOG.md"),
        (with_a_new_file, "not clean: ?? notes.txt"),
        (with_the_tag, f"the tag v{NEW} exists already"),
        (without_changes, "says nothing under '## [Unreleased]'"),
    ],
)
def test_a_repository_that_is_not_ready_is_refused(prepare, reason, repository):
    prepare(repository)
    before = state(repository)
    done = release(repository, NEW)
    assert done.returncode == 2 and reason in done.stderr
    assert state(repository) == before


@pytest.mark.parametrize(
    ("platform", "architecture", "wheel"),
    [("linux", "x86_64", "manylinux_x86_64"), ("linux", "aarch64", "manylinux_aarch64"),
     ("macos", "arm64", "macosx_arm64")],
)  # fmt: skip
def test_one_wheel_is_built_for_each_platform(platform, architecture, wheel):
    pytest.importorskip("cibuildwheel", reason="the extra release, on Python 3.11 and later")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform]
    out = subprocess.run([*command, "--archs", architecture, ROOT], check=True, capture_output=True, text=True).stdout
    assert [name.partition("-")[2] for name in out.split()] == [wheel]
