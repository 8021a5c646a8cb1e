"""Weak scaling on one machine: tokens per second, memory and loss curves of both stages in 1, 2, 4 or 8 processes.

    python benchmarks/parallel.py --processes 1 2 4 8 --output parallel.json
    python benchmarks/parallel.py --table parallel.json     # print what a run wrote
    python benchmarks/parallel.py --tiny --output parallel.json     # two processes on CPU: does it run at all

Models have random weights. Each process trains on as many sequences per step, however many there are; a step's time is
the median after warm-up. Before, every way to train takes a few steps on batches that are the same for any number of
processes: its loss curve.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from measure import message
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.devices import forget_peak_memory, make_accelerator, peak_memory_bytes
from flexdistill.distillation.attention_transfer import AttentionTransfer
from flexdistill.distillation.logits import LogitDistillation
from flexdistill.distillation.loop import run_stage
from flexdistill.errors import FlexdistillError
from flexdistill.recipe import AttentionTransferRecipe, KernelRecipe, LogitDistillationRecipe
from flexdistill.tables import format_bytes, print_table

SHAPES = {
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    | dict(num_key_value_heads=3, vocab_size=49152),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    | dict(num_key_value_heads=8, vocab_size=128256),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    | dict(num_key_value_heads=2, vocab_size=512),
}
SIZES = {  # of a process, unless the command line says otherwise
    "smollm2": {"length": 2048, "batch_size": 16, "micro_batch_size": 16},
    "1b": {"length": 2048, "batch_size": 8, "micro_batch_size": 2},
    "tiny": {"length": 64, "batch_size": 4, "micro_batch_size": 2},
}
LOGITS, FSDP = (LogitDistillation, LogitDistillationRecipe), {"parallel": "fsdp"}
# what the ways are compared with that one process cannot go
UNSHARDED = "logit distillation, DDP"
# a way to train -> its stage, that stage's recipe and settings
WAYS = {
    "attention transfer": (AttentionTransfer, AttentionTransferRecipe, {}),
    UNSHARDED: (*LOGITS, {}),
    "logit distillation, FSDP2": (*LOGITS, FSDP),
    "logit distillation, FSDP2, checkpointing": (*LOGITS, FSDP | {"gradient_checkpointing": True}),
}
LARGE = ("1b", "tiny")  # models that take gradient checkpointing, too
CURVE_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "1b"], choices=SHAPES)
    parser.add_argument("--tiny", action="store_const", const=["tiny"], dest="models", help="a tiny model on CPU")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--length", type=int, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, help="sequences per step and process")
    parser.add_argument("--micro-batch-size", type=int, help="sequences at once; both depend on the model by default")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay micro-batches, but of FSDP2")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, metavar="JSON", help="print what a run wrote, and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        show(json.loads(arguments.table.read_text()))
    elif arguments.output is None:
        parser.error("give --output")
    elif arguments.worker:
        work(json.loads(arguments.worker), arguments.output)
    else:
        cases = [case_of(model, arguments) for model in arguments.models]
        if any(case["batch_size"] % case["micro_batch_size"] for case in cases):
            parser.error("a process's batch must be whole micro-batches")
        show(measure(cases, arguments.processes, arguments.output))


def case_of(model: str, arguments: argparse.Namespace) -> dict:
    """What is measured of a model, in any number of processes."""
    case = {name: getattr(arguments, name) for name in ("compile", "cuda_graphs", "steps", "warmup")}
    case |= {name: getattr(arguments, name) or size for name, size in SIZES[model].items()}
    # whole micro-batches in each process, however many there are
    return case | {"model": model, "curve_batch_size": math.lcm(*arguments.processes) * case["micro_batch_size"]}


def ways_of(model: str, number: int) -> list[str]:
    """One process shards nothing, and small models have memory enough without checkpointing."""
    unused = ({"parallel"} if number == 1 else set()) | ({"gradient_checkpointing"} if model not in LARGE else set())
    return [way for way, (*_, settings) in WAYS.items() if not unused & settings.keys()]


def measure(cases: list[dict], processes: list[int], output: Path) -> dict:
    content = {"torch": torch.__version__, "transformers": transformers.__version__, "models": {}}
    for case in cases:
        result = content["models"][case["model"]] = {"case": case, "runs": []}
        for number in processes:
            run_ = {"processes": number, "launches_s": [], "ways": {}}
            result["runs"].append(run_)
            # a way that fails ends its processes, and those after it are launched anew
            while left := [way for way in ways_of(case["model"], number) if way not in run_["ways"]]:
                started = time.perf_counter()
                found = launch(case | {"ways": left}, number, output.with_suffix(".launch.json"))
                run_["launches_s"].append(time.perf_counter() - started)
                run_["ways"] |= found.pop("ways")
                run_ |= found
                compare(result["runs"])
                # what is measured so far is kept, for a later launch may be cut short
                output.write_text(json.dumps(content, indent=1) + "\n")
    return content


def launch(case: dict, number: int, result: Path) -> dict:
    """What the processes measured of each way; behind one that failed nothing, as the others may wait for it.

    Where no process says what the error was, every way that is left has failed. If this process is stopped, `result`
    stays and holds the ways that were measured until then.
    """
    print(f"{case['model']} in {number} process(es): {case}", file=sys.stderr, flush=True)
    root = Path(__file__).resolve().parents[1]
    # NVLink multicast (NVLS) stays off, so that machines with and without it compare
    environment = {"OMP_NUM_THREADS": "4", "NCCL_NVLS_ENABLE": "0"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    if case["model"] == "tiny":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    errors = result.with_suffix(".errors")
    for file in (result, errors):
        file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    command += [__file__, "--worker", json.dumps(case), "--output", str(result)]
    code = subprocess.run(command, env=environment, stdout=sys.stderr).returncode  # stdout is the table's
    found = json.loads(result.read_text()) if result.exists() else {"ways": {}}
    left = [way for way in case["ways"] if way not in found["ways"]]
    if left and errors.exists():
        found["ways"][left[0]] = {"error": errors.read_text().splitlines()[0]}
    elif left:
        found["ways"] |= {way: {"error": f"exit code {code}"} for way in left}
    for file in (result, errors):
        file.unlink(missing_ok=True)
    return found


def work(case: dict, output: Path) -> None:
    """One process of a case; the main one writes the result."""
    accelerator = make_accelerator("auto")
    size, generator = (CURVE_STEPS * case["curve_batch_size"], case["length"]), torch.Generator().manual_seed(2)
    sequences = torch.randint(SHAPES[case["model"]]["vocab_size"], size, generator=generator)
    found = {"device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu", "ways": {}}
    for way in case["ways"]:
        try:
            found["ways"][way] = run(way, case, sequences, accelerator)
        except Exception as error:
            # of several processes' errors, the first line is what went wrong
            with output.with_suffix(".errors").open("a") as file:
                file.write(message(error) + "\n")
            raise
        gc.collect()  # the way's models lie in cycles
        if accelerator.is_main_process:
            output.write_text(json.dumps(found))
            print(f"{way}: {found['ways'][way]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr, flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_student(case: dict, device: torch.device) -> PreTrainedModel:
    """The converted model, the same for every way and in every process."""
    config = LlamaConfig(**SHAPES[case["model"]], max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # attention that is not uniform, so that there is something to learn
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 3
    torch.manual_seed(1)
    return apply_plan(model, make_plan(model, KernelRecipe()))


def run(way: str, case: dict, sequences: torch.Tensor, accelerator) -> dict:
    """Trains in one way: the loss curve, then steps that are timed, and one more in which waits are counted."""
    stage_class, recipe_class, settings = WAYS[way]
    device = accelerator.device
    untimed = CURVE_STEPS + case["warmup"]
    last = untimed + case["steps"]
    settings = {name: case[name] for name in ("micro_batch_size", "compile", "cuda_graphs")} | settings
    settings["cuda_graphs"] &= settings.get("parallel") != "fsdp"  # which cannot be recorded
    settings["batch_size"] = accelerator.num_processes * case["batch_size"]
    recipe = recipe_class(steps=last + 1, warmup_steps=2, **settings)
    stage = stage_class(make_student(case, device), recipe, accelerator)
    backward = stage.backward

    def whole_micro_batches(batch):
        if len(batch) < case["micro_batch_size"]:  # the loop goes on with smaller ones, which would not compare
            raise FlexdistillError(f"Micro-batches of {case['micro_batch_size']} sequences do not fit into memory.")
        return backward(batch)

    stage.backward = whole_micro_batches
    gc.collect()
    torch.cuda.empty_cache()
    forget_peak_memory(device)
    held = torch.cuda.memory_allocated()
    spans = (0, CURVE_STEPS, case["curve_batch_size"]), (CURVE_STEPS, last + 1, recipe.batch_size)
    ends, losses, waits = [time.perf_counter()], [], Counter()
    with contextlib.ExitStack() as watch:

        def update(step, *, loss, **figures):
            ends.append(time.perf_counter())
            losses.append(loss)
            if step == last and device.type == "cuda":
                watch.enter_context(waits_counted(waits))
            elif step > last:
                watch.close()

        for start, stop, size in spans:
            order = torch.arange((last + 1) * size).remainder(len(sequences)).view(last + 1, -1)
            run_stage(stage, recipe, sequences, order, accelerator, start_step=start, stop_step=stop, update=update)
    times = [after - before for before, after in itertools.pairwise(ends)][untimed:last]
    peak = torch.tensor([peak_memory_bytes(device)], device=device)
    return {
        "tokens_per_s": recipe.batch_size * case["length"] / statistics.median(times),
        "step_s": times,
        "curve": losses[:CURVE_STEPS],
        "peak_memory_bytes": accelerator.gather(peak).tolist(),
        "memory_before_steps_bytes": held,
        "waits": dict(waits),
    }


@contextlib.contextmanager
def waits_counted(waits: Counter) -> Iterator[None]:
    """Counts where the processor waits for the GPU inside the context."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))


def compare(runs: list[dict]) -> None:
    """Adds each way's share of linear scaling and the distance of its losses, from the first number of processes'."""
    first = runs[0]
    for run_ in runs:
        for way, measured in run_["ways"].items():
            base = first["ways"].get(way) or first["ways"][UNSHARDED]
            if "error" in measured or "error" in base:
                continue
            linear = base["tokens_per_s"] * run_["processes"] / first["processes"]
            pairs = zip(measured["curve"], base["curve"], strict=True)
            measured["efficiency"] = measured["tokens_per_s"] / linear
            measured["loss_difference"] = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


def show(content: dict) -> None:
    columns = ["way", "processes", "tokens/s", "of linear", "loss curve, relative", "memory each", "waits per step"]
    for model, result in content["models"].items():
        rows = []
        for way, run_ in itertools.product(WAYS, result["runs"]):
            measured = run_["ways"].get(way, {})
            if "error" in measured:
                rows.append([f"{way}: {measured['error']}", run_["processes"], *[None] * 5])
            elif measured:
                rows.append([way, run_["processes"], round(measured["tokens_per_s"])])
                rows[-1] += [measured.get("efficiency"), measured.get("loss_difference")]
                rows[-1] += [format_bytes(max(measured["peak_memory_bytes"])), sum(measured["waits"].values())]
        case, device = result["case"], result["runs"][0].get("device", "no device")
        title = "{batch_size} x {length} tokens per step and process, {micro_batch_size} sequences at once".format(
            **case
        )
        title += "".join(f", {name}" for name in ("compile", "cuda_graphs") if case[name])
        print_table(columns, rows, title=f"{model}, {device}: {title}")


if __name__ == "__main__":
    main()
