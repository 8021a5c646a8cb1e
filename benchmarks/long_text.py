"""Perplexity by position in a long text, of a teacher and its students.

python benchmarks/long_text.py DIR... --teacher MODEL --data TEXT --output long_text.json

Rotary models are also read beyond the positions that they were trained on, where the teacher itself fails: the number
stands in the results.
"""

import models
from torch import nn

from flexdistill.data import read_documents
from flexdistill.errors import FlexdistillError
from flexdistill.packing import pack
from flexdistill.positions import perplexity_by_position
from flexdistill.recipe import EvaluationRecipe
from flexdistill.tables import positions_table, print_table


def main() -> None:
    parser = models.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a text of at least --length tokens")
    parser.add_argument("--length", type=int, default=16384, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=8, help="sequences, from offsets spread over the text")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens read at once")
    arguments = parser.parse_args()
    rows = pack(
        read_documents(EvaluationRecipe(source=arguments.data)), models.tokenizer_of(arguments), arguments.length
    )
    count = min(arguments.sequences, len(rows))
    # in the middles of equal parts, for a book begins with its contents
    sequences = rows[[(2 * index + 1) * len(rows) // (2 * count) for index in range(count)]]
    spans, positions = {}, None
    for name, model, accelerator in models.models(arguments):
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        learned = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
        if any(embedding.num_embeddings < arguments.length for embedding in learned):
            raise FlexdistillError(f"{name} has positions for {positions} tokens; set --length to that or less.")
        spans[name] = perplexity_by_position(model, sequences, accelerator, arguments.batch_size, arguments.chunk)
        del model
        models.write(
            arguments.output, length=arguments.length, sequences=len(sequences), positions=positions, spans=spans
        )
    print_table(*positions_table(spans))
    print(f"{len(sequences)} sequences; the model has {positions} positions.")


if __name__ == "__main__":
    models.run(main)
