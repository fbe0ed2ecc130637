"""Several threads through every part of the engine, for ThreadSanitizer: see scripts/sanitize.sh.

PYTHONPATH=tests python -m harness.threads pack FOLDER   # tiny models; needs torch
PYTHONPATH=tests python -m harness.threads run FOLDER    # runs them without it
"""

import sys
from pathlib import Path

import numpy as np

from fallow.engine.engine import Engine
from fallow.plan import Cut, Plan


def pack(folder: Path) -> None:
    from conftest import PACKED, make_folder
    from fallow.packing.packer import pack

    for name in PACKED:
        make_folder(name, folder / name)
        pack(folder / name, folder / f"{name}.gguf", quant="f32")
    make_folder("llama", folder / "wide", hidden_size=64)
    pack(folder / "wide", folder / "wide.gguf", quant="f32", shortlist=True)


def run(folder: Path) -> None:
    ids = np.random.default_rng(1).integers(2, 300, 100)
    gate = Cut("gate_act", "threshold", np.full(2, 0.1), np.ones((2, 37)))
    inter = Cut("inter", "threshold", np.full(2, 0.2), "column_norm")
    by_hand = (
        ((Cut("gate_act", "threshold", np.full(2, 0.1)),), 0.0),
        ((gate, inter), 1.0),
        ((Cut("inter", "topk", np.full(2, 0.5), "column_norm"),), 0.0),
        ((Cut("inter", "tail", np.full(2, 0.2), "column_norm"),), 0.0),
    )
    for path in sorted(folder.glob("*.gguf")):
        engine = Engine(path, threads=3)
        made = [
            Plan(path.stem, engine.fingerprint, "by hand", 0.0, "", cuts, head_margin=margin)
            for cuts, margin in by_hand
        ]
        if engine.n_experts:
            fewer = (Cut("router", "tail", np.full(2, 0.5)),)
            made = [Plan(path.stem, engine.fingerprint, "by hand", 0.0, "", fewer)]
        for plan in (None, *made):
            engine.use_plan(plan)
            engine.logits(ids)  # prefill
            for token in ids[:20]:
                engine.reset()
                engine.forward([token])  # decode
        print(path.stem)


if __name__ == "__main__":
    {"pack": pack, "run": run}[sys.argv[1]](Path(sys.argv[2]))
