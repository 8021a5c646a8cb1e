"""What a training step costs beside a forward pass of the teacher's layers on the same tokens, and where its time goes.

python benchmarks/throughput.py --output throughput.json     # SmolLM2's shape, random weights, one GPU
python benchmarks/throughput.py --tiny --output throughput.json     # a tiny model on CPU: does it run at all
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import models
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from flexdistill.attention_modes import softmax_mode
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.devices import make_accelerator
from flexdistill.distillation.cuda_graphs import RecordedBackward
from flexdistill.distillation.reduction import Gradients
from flexdistill.distillation.stage import backward_counting_guards
from flexdistill.pipeline import STAGE_CLASSES
from flexdistill.recipe import STAGES, Recipe
from flexdistill.tables import print_table

SHAPE = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
SHAPE |= dict(num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True)
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, vocab_size=512)
# what a way of training may have
TRAITS = ("decay", "compiled", "recorded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--keep-layers", help="layers that stay softmax, as of convert")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after three that are not")
    ways = ["plain", "decay", "compiled", "compiled+decay", "recorded+decay", "compiled+recorded+decay"]
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--kernels", type=int, default=20, help="rows of the profile")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = []
    for way in arguments.ways:
        results.append(measure(arguments, **{trait: trait in way for trait in TRAITS}))
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        for stage in result["stages"]:
            way = ", ".join(f"{trait} {result[trait]}" for trait in TRAITS)
            print(f"\n{way}, {stage['name']}: {stage['launches']} launches, ms on the device:")
            print_table(["kernel", "ms", "times"], stage["profile"])
    figures = ("name", "ms", "tokens_per_s", "ratio", "device_ms")
    columns = ("stage", "ms per step", "tokens/s", "over the teacher's layers", "ms on the device")
    print_table(
        [*TRAITS, *columns],
        [
            [*(result[trait] for trait in TRAITS), *(stage[name] for name in figures)]
            for result in results
            for stage in result["stages"]
        ],
    )


def measure(arguments: argparse.Namespace, decay: bool, compiled: bool, recorded: bool) -> dict:
    torch.manual_seed(0)
    settings = {"kernel.decay": decay, "kernel.keep_layers": arguments.keep_layers}
    settings |= {f"{stage}.compile": compiled for stage in STAGES} | models.settings(arguments.set)
    recipe = Recipe.load("smollm2").override(settings | ({"precision": "fp32"} if arguments.tiny else {}))
    accelerator = make_accelerator(recipe.precision)
    model = LlamaForCausalLM(LlamaConfig(**(TINY if arguments.tiny else SHAPE)))
    student = apply_plan(model, make_plan(model, recipe.kernel)).to(accelerator.device)
    size = (arguments.batch_size, arguments.length)
    tokens = torch.randint(0, model.config.vocab_size, size, device=accelerator.device)

    def forward():
        with torch.no_grad(), accelerator.autocast(), softmax_mode(student):
            student.base_model(input_ids=tokens)

    teacher_ms = median_ms(forward, arguments.steps)
    result = {
        "decay": decay,
        "compiled": compiled,
        "recorded": recorded,
        "batch": size,
        "keep_layers": arguments.keep_layers,
        "settings": arguments.set,
        "torch": torch.__version__,
        "teacher_ms": teacher_ms,
        "stages": [],
    }
    result["device"] = torch.cuda.get_device_name() if tokens.is_cuda else "cpu"
    for name in ("attention_transfer", "logit_distillation"):
        stage = STAGE_CLASSES[name](student, getattr(recipe, name), accelerator)

        gradients = Gradients(stage.trained().values(), accelerator, stay=recorded)
        backward = RecordedBackward(stage) if recorded else functools.partial(backward_counting_guards, stage)

        def step(stage=stage, gradients=gradients, backward=backward):
            gradients.zero()
            gradients.average(backward(tokens).count)
            gradients.clip(stage.clip_groups, 1.0)
            stage.optimizer.step()

        with stage.active():
            ms = median_ms(step, arguments.steps)
            with profile(activities=[ProfilerActivity.CUDA] if tokens.is_cuda else [ProfilerActivity.CPU]) as found:
                step()
                synchronize()
        result["stages"].append(
            {"name": name, "ms": round(ms, 1), "tokens_per_s": round(1e3 * tokens.numel() / ms)}
            | {"ratio": round(ms / teacher_ms, 2)}
            | summary(found, arguments.kernels)
        )
    return result


def median_ms(function, steps: int) -> float:
    times = []
    for _ in range(3 + steps):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(found: profile, count: int) -> dict:
    """Time on the device, launches, and the kernels that take most of it."""
    kernels = sorted(
        (e for e in found.key_averages() if e.self_device_time_total), key=lambda e: -e.self_device_time_total
    )
    return {
        "device_ms": round(sum(e.self_device_time_total for e in kernels) / 1e3, 1),
        "launches": sum(e.count for e in kernels),
        "profile": [[e.key[:80], round(e.self_device_time_total / 1e3, 2), e.count] for e in kernels[:count]],
    }


if __name__ == "__main__":
    main()
