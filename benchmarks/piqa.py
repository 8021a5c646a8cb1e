"""PIQA (arXiv:1911.11641) by the likelihood of both solutions, of a teacher and its students.

python benchmarks/piqa.py DIR... --teacher MODEL --data piqa.jsonl --output piqa.json

Each line of the data holds `query`, `choices` and the right one's index, `gold`. The prompt is the query and "Answer:".
Accuracy counts the solution with the largest log-likelihood; normalised, with the largest per character.
"""

import json
import statistics

import models

from flexdistill.scoring import score_continuations, tokenize
from flexdistill.tables import print_table

MEASURES = ("accuracy", "normalised_accuracy")


def main() -> None:
    parser = models.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="questions as JSON lines")
    parser.add_argument("--limit", type=int, help="questions at most, from the first")
    parser.add_argument("--batch-tokens", type=int, default=2**14, help="tokens per forward pass")
    arguments = parser.parse_args()
    with open(arguments.data, encoding="utf-8") as file:
        questions = [json.loads(line) for line in file][: arguments.limit]
    tokenizer = models.tokenizer_of(arguments)
    pairs = [
        tokenize(tokenizer, f"{question['query'].rstrip()}\nAnswer:", f" {choice}")
        for question in questions
        for choice in question["choices"]
    ]
    right = {}
    for name, model, accelerator in models.models(arguments):
        scores = iter(score_continuations(model, pairs, accelerator, arguments.batch_tokens))
        right[name] = [answered(question, [next(scores) for _ in question["choices"]]) for question in questions]
        del model
        results = {name: summary(outcomes, right[models.TEACHER]) for name, outcomes in right.items()}
        models.write(arguments.output, questions=len(questions), results=results, right=right)
    columns = ["model", "accuracy", "normalised", "accuracy less teacher's", "normalised less teacher's"]
    rows = []
    for name, result in results.items():
        figures = [percent(result[measure], result[f"{measure}_error"]) for measure in MEASURES]
        differences = [
            percent(result[f"{measure}_difference"], result[f"{measure}_difference_error"]) for measure in MEASURES
        ]
        rows.append([name, *figures, *(["-", "-"] if name == models.TEACHER else differences)])
    print_table(columns, rows)


def answered(question: dict, scores: list) -> list[bool]:
    """Whether the likeliest solution is the right one, and the likeliest per character."""
    plain = [score.log_likelihood for score in scores]
    normalised = [value / len(choice) for value, choice in zip(plain, question["choices"], strict=True)]
    return [values.index(max(values)) == question["gold"] for values in (plain, normalised)]


def summary(outcomes: list[list[bool]], teacher: list[list[bool]]) -> dict[str, float]:
    """Shares, differences to the teacher's on the same questions, and the standard errors of both."""
    result = {}
    for index, measure in enumerate(MEASURES):
        own = [float(outcome[index]) for outcome in outcomes]
        differences = [mine - float(theirs[index]) for mine, theirs in zip(own, teacher, strict=True)]
        for name, values in ((measure, own), (f"{measure}_difference", differences)):
            result[name] = statistics.fmean(values)
            result[f"{name}_error"] = statistics.stdev(values) / len(values) ** 0.5
    return result


def percent(value: float, error: float) -> str:
    return f"{value:.1%} ± {error:.1%}"


if __name__ == "__main__":
    models.run(main)
