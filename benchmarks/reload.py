"""Largest logit difference between loading a checkpoint with flexdistill and with the code that it carries.

python benchmarks/reload.py DIR
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LOAD = """
import sys
import torch
folder, output, with_flexdistill = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
if with_flexdistill:
    import flexdistill
else:
    sys.modules["flexdistill"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not with_flexdistill).eval()
tokens = torch.arange(200)[None] % model.config.vocab_size
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, output)
"""


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    recorded = json.loads((folder / "metrics.json").read_text())["reload_max_logit_difference"]
    with tempfile.TemporaryDirectory() as scratch:
        logits = []
        for with_flexdistill in (True, False):
            output = Path(scratch) / f"{with_flexdistill}.pt"
            arguments = [str(folder), str(output), str(with_flexdistill)]
            cwd = Path(__file__).parents[1] if with_flexdistill else scratch
            subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=cwd)
            logits.append(torch.load(output, weights_only=True))
    print(f"trained model against its reload with flexdistill: {recorded:.1e}")
    print(f"with flexdistill against trust_remote_code without it: {float((logits[0] - logits[1]).abs().max()):.1e}")


if __name__ == "__main__":
    main()
