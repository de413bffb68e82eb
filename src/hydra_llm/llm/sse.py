"""Server-sent events as the HTML standard has them, the same however their bytes are cut."""

import re
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
# A \r at the end of a piece may be half of \r\n where such line ends are used.
EVENT_END = re.compile(rb"\r?\n(?:\r?\n|\r(?=[^\n]))|\r(?!\n)\r\n?")
MARK = b"\xef\xbb\xbf"
LONGEST = 2**26  # bytes of one event


@dataclass(frozen=True, slots=True)
class Event:
    """An event or a comment: its bytes, and what they say."""

    raw: bytes
    data: str | None = None  # None: no event, but comments or blank lines
    kind: str = ""


class EventReader:
    """Cuts a stream of bytes into events. All `raw` together are the stream."""

    def __init__(self) -> None:
        self._rest, self._searched, self._first = bytearray(), 0, True

    def feed(self, piece: bytes) -> list[Event]:
        """The events that end within the next bytes. ValueError: one is longer than `LONGEST`."""
        self._rest += piece
        events = []
        start, at = 0, self._searched
        while match := EVENT_END.search(self._rest, at):
            events.append(self._event(bytes(self._rest[start : match.end()])))
            start = at = match.end()
        del self._rest[:start]
        # An event's end may have begun within the last bytes.
        self._searched = max(0, len(self._rest) - 4)
        if len(self._rest) > LONGEST:
            raise ValueError(f"an event is longer than {LONGEST} bytes")
        return events

    def end(self) -> list[Event]:
        """What is left where the stream ends without a blank line: it counts as an event."""
        rest, self._rest, self._searched = bytes(self._rest), bytearray(), 0
        return [self._event(rest)] if rest else []

    def _event(self, raw: bytes) -> Event:
        content = raw.removeprefix(MARK) if self._first else raw
        self._first = False
        data, kind = list[str](), ""
        for line in LINE_END.split(content):
            name, _, value = line.partition(b":")
            text = value.removeprefix(b" ").decode("utf-8", "replace")
            if name == b"data":
                data.append(text)
            elif name == b"event":
                kind = text
        return Event(raw, "\n".join(data) if data else None, kind)
