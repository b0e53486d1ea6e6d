"""Trainings whose steps are scored by a table, and whose pictures are drawn at once. Import inside tests that use
`comfy`."""

from types import SimpleNamespace

import torch


class Table:
    """A scorer that knows the likeness of each step beforehand."""

    def __init__(self, likeness):
        self.likeness = {0: 0.0, **likeness}  # of the bare model, none
        self.encoder, self.remark = SimpleNamespace(name="table"), ""
        self.measured = []

    def measure(self, step, pictures):
        """Both seeds give the likeness of the step; the other prompts' pictures copy as many hundredths as it has."""
        from tlora_core.reports.live_scores import PictureScores, StepScores

        self.measured.append(step)
        value = self.likeness[step]
        if isinstance(value, Exception):
            raise value
        neutral = [PictureScores(value, 0.5, None)] * len(pictures[0])
        other = [PictureScores(None, 0.25, step / 100)] * len(pictures[0])
        return StepScores.of(step, [neutral, *[other] * (len(pictures) - 1)])


def scored_by(monkeypatch, likeness):
    """Makes a Table the scorer of all runs."""
    from tlora_core.hosts.comfy.training import found

    table = Table(likeness)
    monkeypatch.setattr(found, "encoder_of", lambda keeping, clip: table.encoder)
    monkeypatch.setattr(found, "live_scorer", lambda encoder, personalization, images, keeping: table)
    return table


def drawn_at_once(monkeypatch):
    """Pictures are as grey as ten times their step, from 0 to 255. Gives what was asked for: prompts and seeds."""
    from tlora_core.hosts.comfy.training.personalize import Personalization

    asked = []

    def draw(self, tlora, prompts, seeds):
        asked.append((list(prompts), list(seeds)))
        return [torch.full((len(seeds), 32, 32, 3), self.trainer.step / 25.5) for _ in prompts]

    monkeypatch.setattr(Personalization, "draw", draw)
    return asked
