"""The program that makes the tiny base, run as a whole and from scratch, in miniature: the project can load its
files."""

import json
import os
import subprocess
import sys

import torch
from places import REPO

STEPS = (
    "--scenes 60 --odd-scenes 20 --autoencoder-steps 2 --text-steps 2 --base-steps 4 --flow-steps 3 --scorer-steps 2 "
    "--pairs 0 --decoder-scenes 8 --decoder-steps 20 --gate-pictures 2 --gate-concepts 0 --processes 2 --device cpu"
)


def test_every_stage_runs_and_what_it_writes_loads(comfy, tmp_path):
    import tiny_gate

    work, weights = tmp_path / "work", tmp_path / "weights"
    command = [
        sys.executable,
        str(REPO / "tools" / "train_tiny_base.py"),
        "--work",
        str(work),
        "--output",
        str(weights),
        "--flow-output",
        str(weights / "flow.safetensors"),
        *STEPS.split(),
    ]
    paths = os.pathsep.join([os.environ["TLORA_COMFYUI"], str(REPO)])
    made = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert all(last in made.stdout for last in ("base 4/4", "pairs 3/3", "decoder 20/20", "flow 3/3"))
    report = json.loads((work / "gate.json").read_text())
    assert report["steps"] == 4 and not report["passed"], "nothing is learnt in four steps"
    with torch.inference_mode():
        host = tiny_gate.HostSampler(*tiny_gate.load_flow(weights, weights / "flow.safetensors"))
        assert host.sample("a red star", 0).isfinite().all()
    base = tiny_gate.load_file(weights / "tiny_base.safetensors")
    flow = tiny_gate.load_file(weights / "flow.safetensors")
    moved = [
        (base["model.diffusion_model." + name].float() - value.float()).abs().max().item()
        for name, value in flow.items()
    ]
    assert 0 < max(moved) < 0.05, "the velocity is learnt from where the base stood"
