"""What the pages say of codes that the API gives to programs."""

from collections.abc import Mapping

DONE: Mapping[str, str] = {
    "added": "The record was added.",
    "changed": "The record was changed.",
    "unchanged": "Nothing was changed: the record is the same.",
    "deleted": "The record was deleted, and what was learned from it.",
    "record-off": "The record is off: it is kept, and no answer uses it.",
    "record-on": "The record is on: answers may use it.",
    "corrected": "Thank you: your feedback was kept.",
    "repeated": "The same feedback was given before: nothing was changed.",
    "off": "Personal answers are off. Nothing was deleted.",
    "on": "Personal answers are on.",
    "fit": "Learning has begun: it may take a minute.",
    "revoked": "The key was revoked.",
    "limit": "The limit was set: servers see it within two seconds.",
    "out": "You are signed out.",
    "ended": "Your session has ended: sign in again.",
}
"""Code in a page's address → what has just been done."""

REASONS: Mapping[str, str] = {
    "personal": "Personal answer",
    "off-task": "Gate: the question is not one of the task",
    "not-relevant": "Gate: no record is predicted to help",
    "switched-off": "The user has personal answers off",
    "disabled": "The request asked for no personalization",
    "no-user": "The request names no user",
    "user-not-recognized": "The user was named where it is not read",
    "unknown-user": "Nothing is known of the user",
    "no-history": "The user has no record that can be used",
    "no-question": "There is no question in the request",
    "upstream-refused": "The LLM refused the prompt with records",
    "scoring-failure": "Scoring failed",
    "overloaded": "Too many requests waited",
    "store-failure": "The store did not answer",
}
"""Reason of an answer → what it means."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Personal": ("personal",),
    "Gate": ("off-task", "not-relevant"),
    "No user or records": ("no-user", "user-not-recognized", "unknown-user", "no-history"),
    "Switched off": ("switched-off", "disabled"),
}
"""Group of reasons in the chart → its reasons; all others are of the last group."""
OTHER = "Other and failures"

UNSCORED: Mapping[str, str] = {
    "no-bundle": "no model is in use that could choose: the answer is the LLM's first",
    "no-adapter": "the model has no part that chooses: the answer is the LLM's first",
    "not-text": "the answer is a call of a tool or has a fixed form: it was not chosen",
    "one-sample": "the LLM was asked for one answer only",
    "not-encoded": "the records were still being read: the answer is the LLM's first",
    "no-label": "the answers were no labels of the task: the first one was taken",
    "scoring-failure": "scoring failed: the answer is the LLM's first",
}
"""Why candidates have no scores → what it means."""

CORRECTIONS: Mapping[str, str] = {
    "chosen": "another candidate was chosen",
    "edited": "the answer was written anew",
    "rejected": "the answer was rejected",
    "rating": "the answer was rated",
}
