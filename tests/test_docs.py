"""What the documentation tells people to type: every command parses, and marked blocks run, in the order they stand."""

import re
import shlex
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
import yaml

import flexdistill
from flexdistill.cli import app, main
from flexdistill.data import SAMPLE, read_documents
from flexdistill.recipe import DataRecipe, Recipe
from flexdistill.recipe_sections import Section
from tests import tiny
from tests.test_layering import LAYERS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = "<!-- runs in tests -->"
BLOCK = re.compile(
    rf"(?P<mark>{EXECUTED}\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)

# in the place of the real runs' hours and data
SHORTER = {
    "convert": [
        *("--attention-steps", "1", "--logit-steps", "1", "--batch-size", "2", "--sequence-length", "80"),
        *("--data", "notes.txt", "--set", "evaluation.sequences=2", "--overwrite"),
    ],
    "compare": [
        *("--budget", "480", "--batch-size", "2", "--sequence-length", "80", "--points", "1"),
        *("--set", "evaluation.sequences=2"),
    ],
    "--rank-layers": ["--attention-steps", "1", "--batch-size", "2", "--sequence-length", "80"],
    "train": [
        *("--steps", "1", "--batch-size", "2", "--sequence-length", "80", "--set", "evaluation.sequences=2"),
        "--overwrite",
    ],
    "evaluate": ["--sequence-length", "16", "--sequences", "2"],
}


def blocks(document: Path, language: str) -> list[tuple[str, bool]]:
    """Text of each block, and whether it is marked as executed."""
    found = BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [(block["text"], block["mark"] is not None) for block in found if block["language"] == language]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def flexdistill_arguments(command: list[str]) -> list[str] | None:
    """What follows `flexdistill`, also behind `accelerate launch -m` or `python -m`."""
    if command[0] == "flexdistill":
        return command[1:]
    if command[0] in ("accelerate", "python", "torchrun") and "flexdistill" in command:
        return command[command.index("flexdistill") + 1 :]
    return None


ALL_COMMANDS = [
    pytest.param(command, id=f"{document.name}: {' '.join(command)}")
    for document in DOCUMENTS
    for text, _ in blocks(document, "bash")
    for command in commands(text)
]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_command_parses(command):
    arguments = flexdistill_arguments(command)
    if arguments is not None:
        group = typer.main.get_command(app)
        if arguments[0].startswith("--"):
            assert arguments[0] in {option for parameter in group.params for option in parameter.opts}
            return
        assert arguments[0] in group.commands
        # raises for an unknown option or a missing argument
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("command", [command for command in ALL_COMMANDS if command.values[0][0] == "make"])
def test_make_target_exists(command):
    makefile = (ROOT / "Makefile").read_text()
    for target in takewhile(lambda word: "=" not in word, command[1:]):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


def settings_tables(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every setting of the recipe with its default and description, a table for each section."""
    rows, sections = [], []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections.append((f"{prefix}{name}.", field.annotation))
            continue
        default = yaml.safe_dump(field.get_default(), default_flow_style=True).split("\n")[0]
        inherited = (base.model_fields[name] for base in section.__mro__ if name in getattr(base, "model_fields", {}))
        description = next(filter(None, (one.description for one in inherited)), "")
        if get_origin(field.annotation) is Literal:
            choices = " or ".join(f"`{choice}`" for choice in get_args(field.annotation))
            description = f"{choices}; {description}" if description else choices
        rows.append(f"| `{prefix}{name}` | `{default}` | {description} |\n")
    summary = "" if section is Recipe else f"{section.__doc__.splitlines()[0]}\n\n"
    head = f"### {prefix[:-1] or 'recipe'}\n\n{summary}| setting | default | what it is |\n|---|---|---|\n"
    yield head + "".join(rows)
    for prefix, inner in sections:
        yield from settings_tables(inner, prefix)


@pytest.mark.parametrize("table", list(settings_tables()), ids=lambda table: table.split("\n")[0].removeprefix("### "))
def test_every_setting_is_documented(table):
    assert table in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), f"put this there:\n{table}"


def test_every_module_is_in_the_architecture_of_the_code():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "architecture-of-the-code.md").read_text(), re.MULTILINE)
    assert [set(re.findall("`(\\w+)`", row)) for row in rows] == LAYERS


def test_changelog_tells_of_every_version():
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == "Unreleased" and versions[-1] == "0.1.0"
    assert flexdistill.__version__ in versions


def test_documents_link_to_what_is_there():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_python_compiles(document):
    for text, _ in blocks(document, "python"):
        compile(text, document.name, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_marks_stand_above_blocks(document):
    text = document.read_text(encoding="utf-8")
    marks = re.findall(rf"^{EXECUTED}$", text, re.MULTILINE)
    assert len(marks) == sum(marked for language in ("bash", "python") for _, marked in blocks(document, language))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_marked_blocks_run(document, tmp_path, monkeypatch):
    """`gpt2` is a tiny model, and notes.txt stands where data is named."""
    marked = [block for block in BLOCK.finditer(document.read_text(encoding="utf-8")) if block["mark"]]
    if not marked:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXDISTILL_DEBUG", "1")
    tiny.save_tiny(Path("gpt2"), tiny.tiny_gpt2(), tiny.tiny_tokenizer())
    novel = next(read_documents(DataRecipe(source=str(SAMPLE))))
    Path("notes.txt").write_text(novel[:100_000], encoding="utf-8")
    for block in marked:
        if block["language"] == "python":
            exec(compile(block["text"], document.name, "exec"), {})
            continue
        for command in commands(block["text"]):
            arguments = flexdistill_arguments(command)
            assert arguments is not None, f"a marked block may hold flexdistill commands only, not {command}"
            kind = next((word for word in reversed(arguments) if word in SHORTER), None)
            monkeypatch.setattr(sys, "argv", ["flexdistill", *arguments, *SHORTER.get(kind, [])])
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code, command
