"""The documents name what is there: every option, every key of a plan; and every link leads somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from autoseg import plan
from autoseg.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
REFERENCE = ROOT / "docs" / "reference.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_reference_names_every_command_and_option() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    assert len(commands) >= 7
    for name, command in commands.items():
        assert f"`{name} " in text or f"`{name}`" in text, name
        for option in (parameter for parameter in command.params if parameter.param_type_name == "option"):
            assert any(f"`{written}" in text for written in option.opts), f"{name} {option.opts}"


@pytest.mark.parametrize(
    "kind",
    [
        plan.Plan,
        plan.Configuration,
        plan.Architecture,
        plan.PreprocessingSettings,
        plan.TrainingSettings,
        plan.Normalization,
        plan.Forecast,
        plan.Budget,
        plan.Decision,
    ],
)
def test_the_reference_names_every_key_of_a_plan(kind: type) -> None:
    text = REFERENCE.read_text(encoding="utf-8").split("## plan.json")[1]
    for field in dataclasses.fields(kind):
        assert re.search(rf"[`.]{field.name}[`.]", text), field.name


def test_documents_say_nothing_about_where_they_were_written() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"/(home|root|work|tmp|Users)/", document.read_text(encoding="utf-8")), document
