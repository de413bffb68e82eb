"""Histories are encoded when nobody waits, a few records at a time, so that no question has to wait for it.

What is encoded is what the user has at that moment: what was deleted meanwhile does not come back.
"""

from functools import partial

from hydra_llm.model.features import FeatureStore
from hydra_llm.server.people import People, texts_of
from hydra_llm.server.together import Together
from hydra_llm.store.store import Store

RECORDS_AT_ONCE = 2
"""Six texts that whoever comes meanwhile waits for: some hundredths of a second."""


class Warming:
    """Encodes the histories of those users who were named; each is under way once."""

    def __init__(self, store: Store, people: People, features: FeatureStore, together: Together):
        self._store, self._people, self._features, self._together = store, people, features, together
        self._places: dict[str, int] = {}
        """Of each user who is under way, how many records are done."""

    def begin(self, user: str) -> None:
        """Encode the user's records that have no features yet."""
        if user not in self._places:
            self._places[user] = 0
            self._together.later(partial(self._go_on, user))

    def _go_on(self, user: str) -> None:
        """In the scoring thread: the next records, then whoever else waits."""
        place = self._places.pop(user)
        person = self._people.get(user, self._store.state(user).version)
        records = person.records[place : place + RECORDS_AT_ONCE] if person is not None else ()
        if records:
            self._features.texts(texts_of(records), keep=True)
            self._places[user] = place + len(records)
            self._together.later(partial(self._go_on, user))
