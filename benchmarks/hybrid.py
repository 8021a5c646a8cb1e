"""Hybrids at equal numbers of softmax layers: chosen by KL gain against uniformly placed, in one comparison.

python benchmarks/hybrid.py MODEL --data TEXT --evaluate TEXT --output DIR --keep 2 4 8
"""

import argparse

import models

import flexdistill
from flexdistill.comparison import parse_variant
from flexdistill.tables import comparison_table, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text to train on, and to choose layers on")
    parser.add_argument("--evaluate", required=True, help="text to evaluate on")
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep", type=int, nargs="+", default=[2, 4, 8], help="softmax layers")
    parser.add_argument("--variant", default="nonstationary", help="with settings, as `flexdistill compare` takes it")
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--budget", type=int, help="training tokens of each; default: the recipe's")
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--export", action="store_true", help="also write each converted model")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all students")
    arguments = parser.parse_args()
    kernel = parse_variant(arguments.variant)
    settings = {key.replace(".", "__"): value for key, value in models.settings(arguments.set).items()}
    count = len(flexdistill.plan(arguments.model, recipe=arguments.recipe).converted)
    variants = [kernel]
    for keep in arguments.keep:
        variants += [kernel | {"keep_softmax": keep}, kernel | {"layers": all_but_uniform(count, keep)}]
    comparison = flexdistill.compare(
        arguments.model,
        arguments.output,
        variants=variants,
        windows=[arguments.window],
        budget=arguments.budget,
        recipe=arguments.recipe,
        export_models=arguments.export,
        resume=arguments.resume,
        data__source=arguments.data,
        evaluation__source=arguments.evaluate,
        **settings,
    )
    print_table(*comparison_table(comparison))
    for result in comparison["results"]:
        if result.get("kept_softmax"):
            print(result["name"], *(f"{name} ({gain:.3g})" for name, gain in result["kept_softmax"].items()))


def all_but_uniform(count: int, keep: int) -> str:
    """The layers to convert when `keep` of `count` stay softmax in the middles of equal parts."""
    kept = {(2 * index + 1) * count // (2 * keep) for index in range(keep)}
    return ",".join(str(layer) for layer in range(count) if layer not in kept)


if __name__ == "__main__":
    models.run(main)
