"""The fields of a task.json, checked: an error names the file, the field and the fix."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra_llm.errors import DataError, did_you_mean


class Fields(NamedTuple):
    """Checked access to the fields of a task.json."""

    data: Mapping[str, Any]
    file: str

    def fault(self, name: str, message: str) -> DataError:
        return DataError(message, file=self.file, field=name)

    def text(self, name: str) -> str:
        if name not in self.data:
            raise self.fault(name, "is missing")
        value = self.data[name]
        if not isinstance(value, str) or not value.strip():
            raise self.fault(name, "must be a text that is not empty")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.data.get(name) or ()
        if not isinstance(values, list | tuple):
            raise self.fault(name, "must be a list of texts")
        seen = set[str]()
        for value in values:
            if not isinstance(value, str) or not value or value != value.strip():
                raise self.fault(name, f"{value!r} is not a text without blanks around it")
            if value in seen:
                raise self.fault(name, f"'{value}' stands twice")
            seen.add(value)
        return tuple(values)

    def check_known(
        self, name: str, values: Sequence[str], known: Sequence[str], where: str
    ) -> None:
        for value in values:
            if value not in known:
                near = did_you_mean(str(value), known)
                raise self.fault(name, f"'{value}' is not one of {', '.join(known)}{near}{where}")
