"""Associative recall and needle in text, of a teacher and its students.

python benchmarks/recall.py DIR... --teacher MODEL --data TEXT --output recall.json
"""

import models

from flexdistill.data import read_documents
from flexdistill.recall import make_questions, recall
from flexdistill.recipe import EvaluationRecipe
from flexdistill.tables import print_table


def main() -> None:
    parser = models.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a book to make questions from")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--questions", type=int, default=100, help="of each task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2**15, help="tokens per forward pass")
    arguments = parser.parse_args()
    text = next(read_documents(EvaluationRecipe(source=arguments.data)))
    tokenizer = models.tokenizer_of(arguments)
    questions = make_questions(tokenizer, text, arguments.lengths, arguments.questions, arguments.seed)
    results = {}
    for name, model, accelerator in models.models(arguments):
        results[name] = recall(model, questions, accelerator, batch_tokens=arguments.batch_tokens)
        del model
        models.write(arguments.output, seed=arguments.seed, results=results)
    rows = []
    for group in zip(*results.values(), strict=True):
        shared = [group[0][key] for key in ("task", "length", "facts")]
        rows.append([*shared, *(f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}" for row in group)])
    print_table(["task", "tokens", "facts", *results], rows)


if __name__ == "__main__":
    models.run(main)
