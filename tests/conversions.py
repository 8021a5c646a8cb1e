"""What tests of whole conversions share beside the fixtures `sources` and `interrupt`."""

from safetensors.torch import load_file

from flexdistill.recipe import Recipe
from tests.distillation.stages import assert_equal

SHORT = {
    "data.sequence_length": 32,
    "evaluation.sequences": 4,
    "evaluation.batch_size": 3,
    "attention_transfer.steps": 4,
    "attention_transfer.batch_size": 2,
    "attention_transfer.warmup_steps": 1,
    "logit_distillation.steps": 4,
    "logit_distillation.batch_size": 2,
    "logit_distillation.warmup_steps": 1,
    "checkpoint.every_steps": 2,
}


class Interrupted(BaseException):
    """Not an Exception, as a signal is not."""


def make_recipe(sources, name="llama", **settings):
    base = {"model": str(sources / name), "data.source": str(sources / "text.txt")}
    return Recipe().override(base | SHORT | settings)


def listing(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(actual, expected):
    assert_equal(weights(actual), weights(expected))
