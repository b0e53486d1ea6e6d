"""What a template's note says about steps and ranks is what its sampler does with its model."""

import json
import re

import pytest
import torch
from places import REPO

FAMILIES = {"17": "z-image", "18": "krea2", "19": "sdxl"}


@pytest.mark.parametrize("number", FAMILIES)
def test_ranks_in_a_note_are_those_of_the_templates_steps(comfy, number):
    import comfy.samplers
    import random_models

    from tlora_core import RankSchedule
    from tlora_core.hosts.comfy.model.noise import noise_level

    [path] = (REPO / "workflows").glob(f"{number} *.json")
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    [note] = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    [(_, _, steps, cfg, _, scheduler, _)] = [node["widgets_values"] for node in nodes if node["type"] == "KSampler"]
    said = re.search(r"(\d+) steps use ([\d, ]+) and (\d+) of the 64 ranks", note)
    sampling = random_models.small(FAMILIES[number], device=torch.device("meta")).model.model_sampling
    times, T = noise_level(sampling, comfy.samplers.calculate_sigmas(sampling, scheduler, steps)[:-1])
    ranks = [RankSchedule(64, 32).active_rank(float(t), T) for t in times]
    assert said is not None and (steps, cfg) == (int(said[1]), 1)
    assert ranks == [*map(int, said[2].split(", ")), int(said[3])]
