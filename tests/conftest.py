import os

# before any import of transformers, datasets or tokenizers, which read them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tiny tensors on many threads, in many test processes, are fifty times slower than on one
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # kernels read it when they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import tiny


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return tiny.tiny_tokenizer()
