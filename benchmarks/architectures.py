"""The sweep: every model type of the installed transformers, converted from a tiny random configuration and checked.

    python -m benchmarks.architectures --markdown docs/architectures.md
    python -m benchmarks.architectures llama whisper

Exits with 1 if a model converts and is wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.tiny_configs import tiny_configs
from flexdistill.attention_modes import softmax_mode
from flexdistill.conversion import Plan, apply_plan, make_plan
from flexdistill.errors import FlexdistillError
from flexdistill.example_inputs import example_inputs, float_tensors, tokens
from flexdistill.recipe import KernelRecipe
from flexdistill.runtime.cache import FlexformerCacheLayer
from flexdistill.runtime.feature_maps import FeatureMap

CONVERTS, IN_PART, REFUSED, UNTRIED, WRONG = "converts", "in part", "refused", "not tried", "wrong"
TOLERANCE = 1e-5
LARGEST = 40_000_000  # parameters
SECONDS = 120
# settings that keep a layer softmax in the defaults of some types, and that their published models often leave out
_OPTIONAL = ("sliding_window", "attn_logit_softcapping")
# the head that says most about a model comes first
_AUTO_CLASSES = (
    *("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForMaskedLM", "AutoModelForCausalLM"),
    *("AutoModelForImageTextToText", "AutoModelForZeroShotImageClassification", "AutoModelForImageClassification"),
    *("AutoModelForAudioClassification", "AutoModelForCTC", "AutoModelForSequenceClassification", "AutoModel"),
)


@dataclass
class Outcome:
    """What the sweep found about a model type."""

    model_type: str
    verdict: str
    class_name: str = ""
    converted: int = 0
    kept: Counter = field(default_factory=Counter)  # reason -> attention modules
    why: str = ""
    reload_difference: float = 0.0
    generates: bool = False
    settings: dict = field(default_factory=dict)  # changed from the type's defaults, beside its sizes


def sweep(model_type: str) -> Outcome:
    """Builds, converts and checks one model type; never raises."""
    signal.signal(signal.SIGALRM, _out_of_time)
    try:
        classes = model_classes(model_type)
    except (ImportError, ValueError) as error:  # some need a library that is not installed
        return Outcome(model_type, UNTRIED, why=_line(error))
    if not classes:
        return Outcome(model_type, UNTRIED, why="no head of the auto classes is of this type")
    if not classes[0]._can_set_attn_implementation():
        return Outcome(model_type, REFUSED, classes[0].__name__, why="does not use the AttentionInterface")
    outcome = _try(model_type, {})
    default = CONFIG_MAPPING[model_type]()
    for name in _OPTIONAL:
        if outcome.verdict == REFUSED and getattr(default, name, None) is not None:
            without = _try(model_type, {name: None})
            if without.verdict in (CONVERTS, IN_PART, WRONG):
                return without
    return outcome


def _try(model_type: str, settings: dict) -> Outcome:
    signal.alarm(SECONDS)
    try:
        return _convert(model_type, settings)
    except Exception as error:  # any failure of a foreign model is an answer about it
        return Outcome(model_type, UNTRIED, why=_line(error))
    finally:
        signal.alarm(0)


def _convert(model_type: str, settings: dict) -> Outcome:
    model = tiny_model(model_type, **settings)
    outcome = Outcome(model_type, REFUSED, type(model).__name__, settings=settings)
    try:
        plan = make_plan(model, KernelRecipe())
    except FlexdistillError as error:
        outcome.why = _reason(str(error))
        return outcome
    outcome.converted = len(plan.converted)
    outcome.kept = Counter(module.reason for module in plan.modules if module.spec is None)
    outcome.verdict = IN_PART if outcome.kept else CONVERTS
    try:
        outcome.reload_difference, outcome.generates = check_conversion(model, plan)
    except TimeoutError:
        raise
    except Exception as error:  # whatever goes wrong after a plan was made is our fault
        outcome.verdict, outcome.why = WRONG, _line(error)
    return outcome


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """The classes of the heads that a model type has, the likeliest first."""
    config_class = CONFIG_MAPPING[model_type]
    found = []
    for name in _AUTO_CLASSES:
        mapping = getattr(modeling_auto, name)._model_mapping
        if config_class in mapping:
            models = mapping[config_class]
            found += models if isinstance(models, (tuple, list)) else [models]
    return list(dict.fromkeys(model for model in found if model.config_class is config_class))


def tiny_model(model_type: str, **settings: object) -> PreTrainedModel:
    """The first head and size of a model type that can be built and run, no parameter of which is constant.

    Raises:
        FlexdistillError: if there is none.
    """
    refusals = ["no tiny configuration"]
    for config in tiny_configs(CONFIG_MAPPING[model_type], **settings):
        for model_class in model_classes(model_type):
            try:
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in model_class(config).parameters())
                if size > LARGEST:
                    refusals.append(f"{size:,} parameters")
                    continue
                torch.manual_seed(0)
                model = model_class(config).eval()
                with torch.no_grad():
                    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                        parameter += 0.02 * torch.randn_like(parameter)
                next(runs(model))
                return model
            except TimeoutError:
                raise
            except Exception as error:  # sizes that do not fit together fail in any way
                refusals.append(_line(error) or "no inputs known")
    raise FlexdistillError(f"no tiny model runs: {refusals[-1]}")


def runs(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Name and inputs of every model inside `model`, itself first, that some example inputs fit."""
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            for inputs in example_inputs(part):
                try:
                    outputs(part, inputs)
                except Exception:  # a model raises what it likes for inputs of another kind
                    continue
                yield name, inputs
                break


@torch.no_grad()
def outputs(part: PreTrainedModel, inputs: dict) -> list[torch.Tensor]:
    """Floating-point outputs; a model that draws random numbers draws the same each time."""
    torch.manual_seed(1)
    return float_tensors(part(**inputs))


def check_conversion(model: PreTrainedModel, plan: Plan) -> tuple[float, bool]:
    """Converts `model` and checks all that can be checked of it.

    Returns:
        the largest difference of outputs after saving and loading, and whether it generates.

    Raises:
        AssertionError: if anything is wrong.
    """
    cases = list(runs(model))
    expected = [outputs(model.get_submodule(name), inputs) for name, inputs in cases]
    generates = model.can_generate() and any(m.causal for m in plan.converted) and _generates(model, dict(cases)[""])
    student = apply_plan(model, plan).eval()
    with softmax_mode(student):
        for (name, inputs), teacher in zip(cases, expected, strict=True):
            assert _difference(outputs(student.get_submodule(name), inputs), teacher) == 0, "softmax mode differs"
    before = [outputs(student.get_submodule(name), inputs) for name, inputs in cases]
    assert any(_difference(*pair) > 0 for pair in zip(before, expected, strict=True)), "conversion changes nothing"
    _check_train_step(student, cases)
    actual = [outputs(student.get_submodule(name), inputs) for name, inputs in cases]
    assert any(_difference(*pair) > 0 for pair in zip(actual, before, strict=True)), "training changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        auto = getattr(transformers, type(student)._auto_class)
        reloaded, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(reloaded) is type(student), f"reloads as {type(reloaded).__name__}"
    assert not report["missing_keys"] and not report["unexpected_keys"], "keys differ after reloading"
    again = [outputs(reloaded.eval().get_submodule(name), inputs) for name, inputs in cases]
    difference = max(_difference(*pair) for pair in zip(again, actual, strict=True))
    assert difference <= TOLERANCE, f"reloaded outputs differ by {difference:.1e}"
    if generates:
        check_generation(student, dict(cases)[""])
    return difference, generates


def _generates(model: PreTrainedModel, inputs: dict) -> bool:
    """Whether the model itself generates from these inputs, with a cache as without."""
    try:
        check_generation(model, inputs)
    except TimeoutError:
        raise
    except Exception:  # what a model of any kind raises when more is asked of its inputs
        return False
    return True


def _check_train_step(student: PreTrainedModel, cases: list[tuple[str, dict]]) -> None:
    for name, inputs in cases:
        torch.manual_seed(1)
        found = float_tensors(student.get_submodule(name)(**inputs))
        sum(tensor.square().mean() for tensor in found if tensor.requires_grad).backward()
    for name, module in student.named_modules():
        if isinstance(module, FeatureMap):
            gradients = [parameter.grad for parameter in module.parameters()]
            assert all(gradient is not None for gradient in gradients), f"{name} gets no gradient"
            assert all(gradient.isfinite().all() for gradient in gradients), f"{name} has no finite gradients"
            assert any(gradient.any() for gradient in gradients), f"{name} gets gradients of 0"
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad / parameter.grad.norm().clamp_min(1e-6)
                parameter.grad = None


@torch.no_grad()
def check_generation(student: PreTrainedModel, inputs: dict, count: int = 24) -> None:
    """Cached generation gives the uncached logits, padded or not, with converted layers of constant size."""
    prompt = {name: tensor for name, tensor in inputs.items() if name not in ("use_cache", "decoder_input_ids")}
    if "input_ids" in prompt and not student.config.is_encoder_decoder:
        prompt["attention_mask"] = prompt["attention_mask"].flip(1)
    settings = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    if student.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = int(tokens(student.config)[0, 0])
    cached = student.generate(**prompt, **settings)
    plain = student.generate(**prompt, **settings, use_cache=False)
    difference = max(_difference([a], [b]) for a, b in zip(cached.logits, plain.logits, strict=True))
    scale = max(float(logits.abs().max()) for logits in plain.logits)
    assert difference <= 1e-4 * max(scale, 1), f"cached logits differ from uncached by {difference:.1e}"
    # not the cache that generate returns: Whisper's rebuilds that one from keys and values
    cache = student(**{**inputs, "use_cache": True}).past_key_values
    layers = getattr(cache, "self_attention_cache", cache).layers
    converted = any(isinstance(module, FeatureMap) for module in student.modules())
    assert not converted or any(isinstance(layer, FlexformerCacheLayer) for layer in layers), "the cache keeps KV"


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert len(actual) == len(expected), "the number of outputs differs"
    assert all(a.isnan().equal(e.isnan()) for a, e in zip(actual, expected, strict=True)), "NaN in outputs"
    return max(
        (float((a - e).nan_to_num(0, 0, 0).abs().max()) for a, e in zip(actual, expected, strict=True) if a.numel()),
        default=0.0,
    )


def _line(error: BaseException) -> str:
    # without the places of files on this machine
    lines = re.sub(r" from '/[^']*'", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _reason(message: str) -> str:
    return message.rpartition("can become linear: ")[2].rstrip(".")


def markdown(outcomes: list[Outcome]) -> str:
    """The document that lists what the sweep found."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    good = sorted((o for o in outcomes if o.verdict in (CONVERTS, IN_PART)), key=lambda o: o.model_type)
    worst = max((o.reload_difference for o in good), default=0.0)
    lines = [
        "# Architectures",
        "",
        f"What `python -m benchmarks.architectures` found in transformers {transformers.__version__}. For every model",
        "type it builds a tiny model with random weights, without any code for the family, and converts it. Then it",
        "checks that the converted model computes exactly the original's outputs in softmax mode (difference 0), takes",
        "a training step that reaches every kernel, gives the same outputs after saving and loading (the largest",
        f"difference is {worst:.0e}), and, where the original generates from the same inputs, gives the same logits",
        "when it generates with its cache as without, left-padded sequences included.",
        "",
        f"Of {len(outcomes)} model types {counts[CONVERTS] + counts[IN_PART]} convert, {counts[IN_PART]} of them in",
        f"part; {counts[REFUSED]} are refused; {counts[UNTRIED]} were not tried, because no tiny model of them could",
        f"be built or run from its settings' names alone; {counts[WRONG]} convert and are wrong.",
        "",
        "## Convert",
        "",
        "Attention modules count in the tiny model. Those that stay compute exactly what they did before.",
        "",
        "| model type | class | linear | stay softmax, and why | generates |",
        "|---|---|---|---|---|",
    ]
    for o in good:
        kept = "; ".join(f"{count}: {reason}" for reason, count in sorted(o.kept.items()))
        note = "".join(f" ({name}: null)" for name in o.settings)
        lines.append(
            f"| {o.model_type}{note} | {o.class_name} | {o.converted} | {kept} | {'yes' if o.generates else ''} |"
        )
    for title, verdict in (("Refused", REFUSED), ("Not tried", UNTRIED), ("Wrong", WRONG)):
        rows = sorted((o for o in outcomes if o.verdict == verdict), key=lambda o: o.model_type)
        if rows:
            lines += ["", f"## {title}", "", "| model type | why |", "|---|---|"]
            lines += [f"| {o.model_type} | {o.why.replace('|', '/')} |" for o in rows]
    return "\n".join(lines) + "\n"


def _out_of_time(*_) -> None:
    raise TimeoutError(f"not finished after {SECONDS} s")


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="without any: every type that transformers has a model for")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    types = arguments.model_types or sorted(modeling_auto.MODEL_MAPPING_NAMES)
    _prepare()
    outcomes = []
    # a fresh process now and then, since what a model's module registers stays in memory
    with multiprocessing.get_context("fork").Pool(arguments.processes, maxtasksperchild=20) as pool:
        for outcome in pool.imap_unordered(sweep, types):
            outcomes.append(outcome)
            print(f"{outcome.model_type:32} {outcome.verdict:10} {outcome.class_name:40} {outcome.why}", flush=True)
    counts = Counter(outcome.verdict for outcome in outcomes)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(outcomes), encoding="utf-8")
    sys.exit(1 if counts[WRONG] else 0)


if __name__ == "__main__":
    main()
