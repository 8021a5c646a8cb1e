import os

# before any import of transformers, datasets or tokenizers, which read them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tiny tensors on many threads, in many test processes, are fifty times slower than on one
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return tiny.tiny_tokenizer()
