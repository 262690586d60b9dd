"""What restores a searcher that is built around another library's: what was done to it is done again.

Such a library keeps generators and models that cannot be saved as data, but what it proposes follows from its seed and
from the order in which it was asked and told. That order is all the state there is: it is stored as one compressed
number a trial, and the points themselves come from the trials.
"""

from __future__ import annotations

import base64
import json
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_optcore.search.searcher import Candidate, Searcher, SearchError, Trial
from lightning_optcore.search.space import key_of


class Replayed(Searcher):
    """A searcher whose proposals follow from its seed and the order of asking and telling.

    A subclass proposes one point at a time, and in :meth:`_propose` and :meth:`_learn` uses ``self._seen`` and
    ``self._rng``, but neither ``self.trials`` nor the front, which are complete before a replay begins.
    """

    # How many candidates there were when each trial was told; a point of one's own is counted after it.
    _counts: list[int]

    def tell(
        self,
        candidate: Candidate,
        objectives: Sequence[float] | float | None = None,
        *,
        failure: str | None = None,
        violation: float = 0.0,
    ) -> Trial:
        """Say what a candidate was worth; see :meth:`Searcher.tell`."""
        count = self._next_id
        trial = super().tell(candidate, objectives, failure=failure, violation=violation)
        self._counts.append(count)
        return trial

    @abstractmethod
    def _begin(self) -> None:
        """Build the other library's searcher anew, as it was before anything was asked."""

    def _ask_again(self, candidate: Candidate) -> None:
        """Let the other library propose a candidate once more.

        Raises:
            SearchError: If it proposes another one.
        """
        proposed = [params for params, *_ in self._propose(1)]
        if [key_of(params) for params in proposed] != [key_of(candidate.params)]:
            raise SearchError(
                f"candidate {candidate.id} was {candidate.params}, and is {proposed} when asked for again: restoring "
                f"needs a {type(self).__name__} of the same options and versions whose proposals follow from its seed"
            )

    def _own_state(self) -> dict[str, Any]:
        steps = np.diff(self._counts, prepend=0).tolist()
        return {"asked": base64.b64encode(zlib.compress(json.dumps(steps).encode())).decode()}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        counts = np.cumsum(json.loads(zlib.decompress(base64.b64decode(own["asked"]))), dtype=int).tolist()
        if len(counts) != len(self.trials):
            raise SearchError(
                f"state of {len(self.trials)} trials: expected the {len(counts)} that were told, in order"
            )
        rng, self._rng = self._rng, np.random.default_rng(self.seed)
        self._seen = set()
        self._begin()
        asked = {one.id: one for one in [*self._pending.values(), *(trial.candidate for trial in self.trials)]}
        next_id = 0
        for count, trial in zip([*counts, self._next_id], [*self.trials, None], strict=True):
            for candidate in (asked[i] for i in range(next_id, count)):
                if candidate.origin != "initial":
                    self._ask_again(candidate)
                self._seen.add(key_of(candidate.params))
            next_id = count
            if trial is not None:
                if trial.candidate.id == count:
                    self._seen.add(key_of(trial.params))
                    next_id += 1
                self._learn(trial)
        self._counts, self._rng = counts, rng
