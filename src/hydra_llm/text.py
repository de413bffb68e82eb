"""Text that every file, database, terminal and engine takes: repair it, fold it, find its fault."""


def repair(text: str) -> str:
    """Lone surrogates, which JSON may hold but UTF-8 cannot, become U+FFFD; NUL becomes a blank."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", " ")


def fold(text: str) -> str:
    """All white space becomes single blanks: the text stays on one line."""
    return " ".join(text.split())


def text_fault(text: str, may_be_empty: bool = False) -> str:
    """What makes a text unusable, or ''."""
    if not text.strip() and not may_be_empty:
        return "is empty"
    if "\0" in text:
        return "holds a NUL character: remove it"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is no character: remove it"
    return ""
