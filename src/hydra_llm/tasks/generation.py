"""Generation: the answer is a free text (LaMP-4, LaMP-5, LaMP-7)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from hydra_llm.extras import require
from hydra_llm.tasks import base
from hydra_llm.tasks.base import CohortStats, Floats, HistoryVectors, Pairs, Parsing, PromptWords
from hydra_llm.text import length, spaced, words
from hydra_llm.types import Candidate, Record


def _bleu(sums: Floats) -> Floats:
    """0 to 100: sacrebleu's corpus BLEU (13a, exponential smoothing), computed from its sums."""
    ours, theirs, right, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    missed = 2.0 ** np.cumsum(right == 0, axis=1)
    precision = np.where(right > 0, right, 1 / missed) / np.maximum(total, 1)
    brevity = np.exp(np.minimum(0, 1 - theirs / np.maximum(ours, 1)))
    defined = right.any(axis=1) & (total > 0).all(axis=1)
    return np.where(defined, 100 * brevity * np.exp(np.log(precision).mean(axis=1)), 0.0)


class Generation(base.TaskKind):
    """A free text."""

    metrics = (
        base.MetricSpec("rouge1"),
        base.MetricSpec("rougeL"),
        base.MetricSpec("bleu", _bleu, in_improvement=False),
    )

    def parse(self, text: str, parsing: Parsing) -> str | None:
        """The stripped text. Lenient: its first line that says something, as `_plain` has it, and
        is no part of the prompt.
        """
        if parsing == "strict":
            return text.strip() or None
        text = self.prompt_words().stripped(text)
        lines = [line for line in map(_plain, text.splitlines()) if line]
        # "Here is a headline:" announces the next line
        answers = [line for line in lines if not line.endswith(":")]
        return next(iter(answers or lines), None)

    def gain(self, answer: str, gold: str) -> float:
        return overlap(answer, gold, self.task.words)

    def typical(self, outputs: Sequence[str]) -> str:
        """The latest text."""
        return outputs[-1] if outputs else ""

    def metric_rows(self, metric: str, pairs: Pairs) -> Floats:
        """[N, 2] of ROUGE F-measures, or [N, 10] counts of BLEU. With `unicode` words, BLEU too has
        characters for words in scripts without blanks (for Chinese: sacrebleu's `zh`).
        """
        lamp = self.task.words == "lamp"
        require("bench", f"the metric {metric}")
        if metric == "bleu":  # as sacrebleu: lengths, matching and all n-grams for n = 1 to 4
            from sacrebleu.metrics.bleu import BLEU

            texts = [(answer or "", gold) for answer, gold in pairs]
            if not lamp:
                texts = [(spaced(answer), spaced(gold)) for answer, gold in texts]
            scores = [BLEU().corpus_score([answer], [[gold]]) for answer, gold in texts]
            rows = [[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores]
            return np.array(rows, dtype=np.float64).reshape(-1, 10)
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        # With a tokenizer of its own choice it logs a line, which sets up Python's root logger.
        tokenizer = DefaultTokenizer(use_stemmer=False) if lamp else _Unicode()
        scorer = RougeScorer([metric], tokenizer=tokenizer)
        measures = [scorer.score(gold, answer or "")[metric].fmeasure for answer, gold in pairs]
        return base.with_count(measures)

    def prompt_words(self) -> PromptWords:
        header = "Here is what this person wrote for earlier texts."
        return PromptWords(header, "Text", "This person wrote")

    def vectorize(self, records: Sequence[Record], embed: base.Embed) -> HistoryVectors:
        outputs = [record.output for record in records]
        inputs = embed([record.input for record in records])
        return HistoryVectors(inputs, embed(outputs), np.zeros(0, dtype=np.int64), _words(outputs))

    def cohort_stats(self, outputs: Sequence[str], reference: float) -> CohortStats:
        words = float(np.median(_words(outputs))) if outputs else CohortStats().words
        return CohortStats((), reference, words)

    @property
    def candidate_columns(self) -> tuple[str, ...]:
        own = ("own_nearest", "own_mean", "length", "length_signed", "cosine")
        return (*own, "llm_agreement", "llm_votes", "llm_greedy")

    def candidate_features(
        self, context: base.FeatureContext, candidates: Sequence[Candidate]
    ) -> Floats:
        texts, history = [candidate.text for candidate in candidates], context.history
        vectors, gains = context.embed(texts), self.gain_matrix(texts)
        own = vectors @ history.answers.T if len(history) else np.zeros((len(texts), 1))
        usual = np.log1p(np.median(history.words) if len(history) else context.stats.words)
        length = np.log1p(_words(texts)) - usual
        votes = np.array([candidate.votes for candidate in candidates], dtype=np.float64)
        columns = [
            own.max(1),
            own.mean(1),
            -np.abs(length),
            length,
            vectors @ context.query,
            (gains.sum(0) - gains.diagonal()) / max(1, len(texts) - 1),
            votes / max(1.0, votes.sum()),
            np.array([float(candidate.greedy) for candidate in candidates]),
        ]
        return np.stack(columns, 1).astype(np.float64)

    word_columns = ("expected_rouge",)
    gain_columns = ("expected_rouge",)

    def word_features(
        self, context: base.FeatureContext, candidates: Sequence[Candidate]
    ) -> Floats:
        return self._expected(context, [candidate.text for candidate in candidates])

    record_word_columns = ("word_overlap",)

    def record_word_features(
        self, context: base.FeatureContext, records: Sequence[Record]
    ) -> Floats:
        return self._expected(context, [record.output for record in records])

    def _expected(self, context: base.FeatureContext, answers: Sequence[str]) -> Floats:
        """[N, 1] the expected gain of these answers by the word model."""
        assert context.word_shares is not None
        texts, history = [words(answer) for answer in answers], context.history
        usual = np.mean(history.words) if len(history) else context.stats.words
        asked = sorted({word for text in texts for word in text})
        shares = dict(zip(asked, context.word_shares(asked).tolist(), strict=True))
        return np.array([expected_overlap(text, shares, float(usual)) for text in texts])[:, None]

    record_columns = ("answer_cosine", "answer_words")

    def record_features(self, context: base.FeatureContext, records: Sequence[Record]) -> Floats:
        outputs = [record.output for record in records]
        lengths = np.log1p(_words(outputs)) - np.log1p(context.stats.words)
        return np.stack([context.embed(outputs) @ context.query, lengths], 1).astype(np.float64)


def _words(texts: Sequence[str]) -> Floats:
    """[N] lengths in words."""
    return np.array([length(text) for text in texts], dtype=np.float64)


class _Unicode:
    """A tokenizer of rouge_score."""

    def tokenize(self, text: str) -> Sequence[str]:
        return words(text) or text.split()  # signs alone, such as arrows


# ---- lenient parsing: one line without what surrounds an answer

_BEFORE = (
    r"the|a|an|your|my|here(?:['’]s| is)|suggested|possible|new|generated|paraphrased|paper|article"
    "|news|email"
)
_NAMED = r"title|headline|subject(?: line)?|tweet|paraphrase|answer|output|response"
_PREFIX = re.compile(rf"^(?:(?:{_BEFORE})\s+)*(?:{_NAMED})\s*:\s*", re.IGNORECASE)
_HEADING = re.compile(r"^#+\s+")
_MARKUP = re.compile(r"\*\*|</?answer>", re.IGNORECASE)
_QUOTES = ('""', "''", "“”", "‘’", "«»", "„“", "``", "__")


def _plain(line: str) -> str:
    """A line without quotes, markdown and a leading "Title:", however nested."""
    before = None
    while line != before:
        before = line
        line = _PREFIX.sub("", _HEADING.sub("", _MARKUP.sub("", line).strip()))
        ends, inner = line[:1] + line[-1:], line[1:-1]
        if ends in _QUOTES and not set(ends) & set(inner):
            line = inner.strip()
    return line


def overlap(answer: str, gold: str, words_of: base.Words = "lamp") -> float:
    """(ROUGE-1 + ROUGE-L) / 2, F-measures without stemmer. LaMP's words are ASCII as in
    rouge_score; where a text has none, both are read as words of any script.
    """
    if answer == gold:
        return 1.0
    for word in (_lamp_words, words) if words_of == "lamp" else (words,):
        ours, theirs = word(answer), word(gold)
        if ours and theirs:
            both = len(ours) + len(theirs)
            common = sum((Counter(ours) & Counter(theirs)).values())
            return (2 * common / both + 2 * _common_subsequence(ours, theirs) / both) / 2
    return 0.0


LENGTH_SHARE = 0.5


def expected_overlap(text: Sequence[str], shares: Mapping[str, float], usual: float) -> float:
    """About the expected `overlap` of a text's words with an answer that has each word with its
    share; `usual` is the answer's length. 0 for a text without words.

    ROUGE-1 would have the whole length in the denominator. ROUGE-L falls with a text's length, as
    fewer of its words are in the answer's order: `LENGTH_SHARE` of it, chosen on training users of
    two tasks, correlates more with the gain (docs/lab.md).
    """
    if not text:
        return 0.0
    expected = sum(shares[word] for word in set(text))
    return (1 + LENGTH_SHARE) * expected / (len(text) + LENGTH_SHARE * usual)


@lru_cache(maxsize=16384)
def _lamp_words(text: str) -> tuple[str, ...]:
    return tuple(re.findall("[a-z0-9]+", text.lower()))


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(ours)) - 1
    for word in theirs:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(ours) - row.bit_count()
