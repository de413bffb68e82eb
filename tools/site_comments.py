"""An extension of Griffe, which reads the package for mkdocstrings: the public fields of a class
become a table below its docstring, each with its type, default and docstring, or the comment at the
end of its line, as api.md shows it.
"""

from typing import Any

from griffe import Attribute, Class, Docstring, Extension


def told(field: Attribute) -> str:
    """What is said of a field."""
    if field.docstring:
        return " ".join(field.docstring.value.split())
    line = field.lines_collection[field.filepath][(field.endlineno or 1) - 1]
    return str(line.partition("  # ")[2])


def entry(field: Attribute) -> str:
    """A line of a list of attributes in Google's style."""
    default = f" Default: `{field.value}`." if field.value is not None else ""
    text = told(field).rstrip(".")
    said = f"{text[0].upper()}{text[1:]}." if text else ""
    return f"    {field.name} ({field.annotation}): {said}{default}".rstrip()


class Fields(Extension):
    """Moves the fields of a class into its docstring."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        fields = [
            member
            for name, member in cls.members.items()
            if isinstance(member, Attribute)
            and not name.startswith("_")
            and member.annotation is not None
            and not member.has_labels("property")
        ]
        if not fields:
            return
        lines = ["Attributes:", *map(entry, fields)]
        before = cls.docstring.value.rstrip() + "\n\n" if cls.docstring else ""
        cls.docstring = Docstring(
            before + "\n".join(lines), parent=cls, parser=cls.docstring and cls.docstring.parser
        )
        for field in fields:
            del cls.members[field.name]
