"""The third stage: longer rows, joined from the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distill_standin import tiny_student, tiny_teacher, token_rows

from rewriter.cli.distilling import _fitting
from rewriter.distill import Progress, Rows, Silent, distill, parse_config, recipe
from rewriter.distill.match_logits import MatchLogits
from rewriter.errors import UsageError

SETTINGS: dict[str, Any] = {
    "length": 12,
    "dtype": "float32",
    "fit": 0,
    "checkpoint_every": 2,
    "layers": {"steps": 2},
    "logits": {"steps": 3, "train": "core"},
    "long": {"length": 36, "steps": 5, "train": "all"},
}


def rows() -> Rows:
    return Rows(token_rows(11, 12))


class StopAt(Silent):
    """Interrupts a run behind a step."""

    def __init__(self, stage: str, step: int):
        self.at = (stage, step)

    def update(self, progress: Progress) -> None:
        if (progress.stage, progress.step) == self.at:
            raise KeyboardInterrupt


def test_rows_are_joined_in_their_order() -> None:
    long = rows().joined(3)
    assert long.ids.shape == (3, 36)
    assert torch.equal(long.ids.flatten(), rows().ids[:9].flatten())


def test_three_stages_run_on_rows_of_their_own() -> None:
    teacher = tiny_teacher()
    stages = distill(teacher, tiny_student(teacher), rows(), parse_config(SETTINGS)).stages
    assert [(s.name, s.steps, s.tokens) for s in stages] == [
        ("layers", 2, 24),
        ("logits", 3, 36),
        ("long", 5, 180),
    ]


def test_its_loss_is_the_cross_entropy_of_the_next_token() -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    stage = MatchLogits(teacher, student, parse_config(SETTINGS), "long")
    long = rows().joined(3)
    with torch.no_grad():
        logits = student(input_ids=long.ids).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, long.ids[:, 1:].flatten())
    assert stage.backward(long, 1.0).total == pytest.approx(float(wanted), rel=1e-5)


TRAINED = ("core", "lora", "all")


@pytest.mark.parametrize("second", TRAINED)
@pytest.mark.parametrize("third", TRAINED)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    second: str, third: str, tmp_path: Path
) -> None:
    """Also where the third stage does not train what the second one changed."""
    stages = {
        "logits": {**SETTINGS["logits"], "train": second, "body_lr": 1e-3},
        "long": {**SETTINGS["long"], "train": third},
    }
    config = parse_config({**SETTINGS, **stages})

    def run(folder: Path, reporter: Silent) -> dict[str, torch.Tensor]:
        teacher = tiny_teacher()
        student = tiny_student(teacher)
        distill(teacher, student, rows(), config, folder=folder, reporter=reporter)
        return student.state_dict()

    whole = run(tmp_path / "whole", Silent())
    for stage, step in (("logits", 3), ("long", 1), ("long", 4)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", StopAt(stage, step))
    for _ in range(2):  # the second time it is done already
        again = run(tmp_path / "parts", Silent())
        assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_what_cannot_be_joined_is_refused() -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    before = {n: p.clone() for n, p in student.state_dict().items()}
    config = parse_config(SETTINGS)
    with pytest.raises(UsageError, match="needs 3 rows of 12 tokens"):
        distill(teacher, student, Rows(token_rows(2, 12)), config)
    for width in (24, 48):
        with pytest.raises(UsageError, match=f"The rows have {width} tokens"):
            distill(teacher, student, Rows(token_rows(6, width)), config)
    # before anything is trained
    assert all(torch.equal(student.state_dict()[n], p) for n, p in before.items())
    with pytest.raises(UsageError, match="Rows with padding"):
        Rows(token_rows(6, 12), torch.ones(6, 12, dtype=torch.int64)).joined(2)
    for length in (12, 30):
        with pytest.raises(UsageError, match="must be a multiple"):
            parse_config({**SETTINGS, "long": {"length": length, "steps": 1}})


def test_the_command_line_takes_as_long_rows_as_the_model_reads() -> None:
    class Config:
        max_position_embeddings = 8192

    settings = recipe("radlads").config
    fitted = _fitting(settings, Config, language=True)
    assert fitted.long is not None and fitted.long.length == 8192
    Config.max_position_embeddings = 700
    assert _fitting(settings, Config, language=True).long is None
    alone = settings.model_copy(update={"layers": None, "logits": None})
    with pytest.raises(UsageError, match="reads 700 tokens, too few"):
        _fitting(alone, Config, language=True)
    encoder = _fitting(recipe("minilm").config, Config, language=False)
    assert encoder.logits is not None and encoder.logits.divergence == 0
    assert _fitting(recipe("mohawk").config, Config, language=False).logits is None
