"""Run in a process of its own: loads each checkpoint of a folder, and says what it computes.

    python hf_load.py FOLDER

FOLDER has one folder for each model; its logits go into ``logits.pt`` in it.
"""

import sys
from pathlib import Path

import torch
import transformers

import hf_helpers


def main(checkpoints: Path) -> None:
    for folder in sorted(checkpoints.iterdir()):
        auto = getattr(transformers, (folder / "auto.txt").read_text())
        model = auto.from_pretrained(folder / "model")
        torch.save(hf_helpers.logits(model), folder / "logits.pt")
        print(folder.name, sum(p.numel() for p in model.parameters()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
