"""What a search has measured, on disk: a search that was stopped goes on where it was.

One line of JSON a probe, appended as it is measured. A search is a function of its scores, so one
that finds them here takes the same way again without running the model.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from rewriter.atomic import output_error
from rewriter.errors import InputError
from rewriter.planner.objective import Objective, Score
from rewriter.planner.space import SearchSpace

Key = tuple[tuple[int, ...], int]  # an assignment and a draw


def digest(space: SearchSpace, objective: Objective) -> str:
    """Identity of what scores depend on: probes, text, candidates, dtype."""
    dtypes = sorted({str(p.dtype) for p in space.model.parameters()})
    choices = [[(c.mixer, dict(c.options)) for c in row] for row in space.candidates]
    text = json.dumps([str(objective.probes), choices, dtypes], default=str)
    hasher = hashlib.sha256(text.encode())
    hasher.update(objective.stream.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


class Journal:
    """Scores by assignment and draw.

    Attributes:
        scores: what is known.
        seconds: processor time that the entries took, those of earlier runs included.
    """

    def __init__(self, path: Path, identity: str):
        """Read a journal, or begin one.

        Raises:
            InputError: it is that of another search.
            OutputError: it cannot be written.
        """
        self.path = path
        self.scores: dict[Key, Score] = {}
        self.seconds = 0.0
        self._last = time.process_time()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and lines[0] != identity:
            raise InputError(f"'{path}' is the journal of another search: name another file")
        if not lines:
            self._append(identity, "w")
        for line in lines[1:]:
            try:
                picks, draw, text, copy, seconds = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            self.scores[tuple(picks), draw] = Score(text, copy)
            self.seconds += seconds

    def add(self, picks: tuple[int, ...], draw: int, score: Score) -> None:
        """One more score; it took the time since the one before."""
        now = time.process_time()
        seconds, self._last = now - self._last, now
        self.scores[picks, draw] = score
        self.seconds += seconds
        self._append(json.dumps([picks, draw, score.text, score.copy, round(seconds, 3)]))

    def _append(self, line: str, mode: str = "a") -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise output_error(self.path, error) from error
