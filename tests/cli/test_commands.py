"""The one command line: its table, its help, what it records as typed, and the scripts that lead to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import command_lines
import pytest

import hf_kvattn
from hf_kvattn.tools import commands as command_line
from hf_kvattn.tools.command_line import program, typed
from hf_kvattn.tools.commands import COMMANDS

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {"attention_claims": "claims", "make_model_card": "card"}  # the others have their command's name


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        command_line.main(arguments)
    return end.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    assert ended([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"    hf-kvattn {name}" in said or name == "describe"
    assert name == name.lower() and "_" not in name and COMMANDS[name].help


def test_the_overview_lists_every_command(capsys):
    assert ended(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and row.help in said for name, row in COMMANDS.items())
    assert ended(["--version"]) == 0 and hf_kvattn.__version__ in capsys.readouterr().out
    assert ended(["no-such-command"]) == 2 and "no-such-command" in capsys.readouterr().err
    assert ended(["plan", "--no-such-option"]) == 2


def test_without_a_command_the_machine_is_described(capsys):
    assert command_line.main([]) == command_line.main(["describe"]) == 0
    first, second = capsys.readouterr().out.split("python ")[1:]
    assert "backend asked for" in first and first == second


def test_a_command_imports_its_own_module_alone():
    code = "import sys; from hf_kvattn.tools.commands import main; main(['describe']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name for name in out.split() if name.startswith(("hf_kvattn.evaluation.", "hf_kvattn.convert"))}
    assert not loaded and "matplotlib" not in out.split()


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.py")), ids=lambda path: path.stem)
def test_every_script_leads_to_its_command(path, capsys):
    assert command_lines.run(path.stem, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {path.name} ")
    assert f"    hf-kvattn {SCRIPTS.get(path.stem, path.stem.replace('_', '-'))} " in said


@pytest.mark.parametrize(
    ("started", "named", "recorded"),
    [
        ("scripts/throughput.py", "throughput.py", ["python", "scripts/throughput.py", "--json"]),
        ("/env/bin/hf-kvattn", "hf-kvattn", ["hf-kvattn", "--json"]),
        ("/env/hf_kvattn/__main__.py", "python -m hf_kvattn", ["python", "-m", "hf_kvattn", "--json"]),
    ],
)
def test_what_was_typed_is_recorded(monkeypatch, started, named, recorded):
    monkeypatch.setattr(sys, "argv", [started, "--json"])
    assert program() == named and typed() == recorded


def test_bad_input_is_one_line_and_status_2(capsys, tmp_path):
    assert command_line.main(["card", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ": error: " in said
